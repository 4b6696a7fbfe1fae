"""Pool the activations of a layer to one vector per image."""

from torch import Tensor
from torch.nn import functional as F


def pool(x: Tensor, pooling: str | int, layer: str) -> Tensor:
    """Pool the activations of a layer to one vector per image.

    Parameters
    ----------
    x : Tensor
        Of shape ``(n, channels)``, ``(n, channels, h, w)`` or, from a transformer,
        ``(n, tokens, channels)``.
    pooling : {"avg", "max", "gem", "flatten"} or int
        Average (``"avg"``) or maximum (``"max"``) over positions; generalized mean with
        exponent 3 (``"gem"``) [1]_; all values (``"flatten"``); or an int k, averages
        over a grid of k x k cells. Activations without positions are not pooled.
    layer : str
        Name of the layer, for the error message.

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
    if x.ndim == 3 and not isinstance(pooling, int):
        x = x.transpose(1, 2)  # (n, tokens, c) -> (n, c, tokens)
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
