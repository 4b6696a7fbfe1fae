"""Pool the activations of a layer to one vector per image."""

import math

from torch import Tensor
from torch.nn import functional as F


def pool(
    x: Tensor,
    pooling: str | int,
    layer: str,
    *,
    n_prefix_tokens: int = 0,
    has_class_token: bool = True,
) -> Tensor:
    """Pool the activations of a layer to one vector per image.

    Parameters
    ----------
    x : Tensor
        Of shape ``(n, channels)``, ``(n, channels, h, w)`` or, from a transformer,
        ``(n, tokens, channels)``.
    pooling : {"avg", "max", "gem", "cls", "flatten"} or int
        Average (``"avg"``) or maximum (``"max"``) over positions; generalized mean with
        exponent 3 (``"gem"``) [1]_; the class token (``"cls"``); all values
        (``"flatten"``); or an int k, averages over a grid of k x k cells, for
        ``(n, channels, h, w)``. Activations without positions are not pooled.
    layer : str
        Name of the layer, for the error message.
    n_prefix_tokens : int, default=0
        Number of tokens before those of the patches, which are no positions.
    has_class_token : bool, default=True
        Whether the first of these is the class token.

    Returns
    -------
    Tensor of shape (n, n_features), float32
        It shares no memory with `x`, which later layers may overwrite.

    Raises
    ------
    ValueError
        If `pooling` does not apply to activations of that shape.

    References
    ----------
    .. [1] Radenović, Tolias, Chum: *Fine-tuning CNN Image Retrieval with No Human
       Annotation*, 2019.
    """
    x = x.float()
    if x.ndim == 2:
        return x.clone()
    if pooling == "flatten":
        return x.flatten(1).clone()  # (n, c, h, w) -> (n, c * h * w)
    if pooling == "cls":
        if x.ndim != 3 or n_prefix_tokens == 0 or not has_class_token:
            registers = f", of which {n_prefix_tokens} tokens are registers"
            raise ValueError(
                "pooling='cls' needs a layer with a class token. Got the layer "
                f"{layer!r}, with activations of shape {tuple(x.shape[1:])} per image"
                f"{registers if n_prefix_tokens and not has_class_token else ''}. "
                "Choose another pooling or another layer."
            )
        return x[:, 0].clone()  # (n, tokens, c) -> (n, c)
    if x.ndim == 3 and not isinstance(pooling, int):
        # (n, tokens, c) -> (n, c, patches)
        x = _patch_tokens(x, n_prefix_tokens, layer).transpose(1, 2)
    elif x.ndim == 4 and isinstance(pooling, int):
        return F.adaptive_avg_pool2d(x, pooling).flatten(1)  # (n, c * k * k)
    elif x.ndim == 4:
        x = x.flatten(2)  # (n, c, h, w) -> (n, c, positions)
    else:
        raise ValueError(
            f"pooling={pooling!r} needs a layer with rows and columns. Got the layer "
            f"{layer!r}, with activations of shape {tuple(x.shape[1:])} per image. "
            "Choose another pooling."
        )
    if pooling == "avg":
        return x.mean(2)
    if pooling == "max":
        return x.amax(2)
    assert pooling == "gem"
    return x.clamp(min=1e-6).pow(3).mean(2).pow(1 / 3)


def patch_map(x: Tensor, n_prefix_tokens: int, layer: str) -> Tensor:
    """Arrange the tokens of the patches of an image in rows and columns.

    Parameters
    ----------
    x : Tensor of shape (n, tokens, channels)
        Activations of a layer.
    n_prefix_tokens : int
        Number of tokens before those of the patches.
    layer : str
        Name of the layer, for the error message.

    Returns
    -------
    Tensor of shape (n, channels, side, side)
        Rows of patches from top to bottom.

    Raises
    ------
    ValueError
        If the number of patches is not a square number.
    """
    patches = _patch_tokens(x, n_prefix_tokens, layer)
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise ValueError(
            "An int as pooling needs a layer with rows and columns, or a square number "
            f"of patch tokens. Got the layer {layer!r}, with {patches.shape[1]} patch "
            "tokens. Choose another pooling."
        )
    return patches.transpose(1, 2).reshape(x.shape[0], -1, side, side)


def _patch_tokens(x: Tensor, n_prefix_tokens: int, layer: str) -> Tensor:
    patches = x[:, n_prefix_tokens:]
    if patches.shape[1] == 0:
        raise ValueError(
            f"The layer {layer!r} must have tokens of patches to be pooled. Got class "
            "and register tokens alone. Choose pooling='cls' or another layer."
        )
    return patches
