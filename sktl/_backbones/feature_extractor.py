"""Feature extraction: the activations of layers, pooled to one vector per image.

A layer is ``"penultimate"`` (the input of the last linear layer of the network), the
name of a stage, or the name of any module of the network. The activations of a layer
are pooled to a vector; several layers are computed in one forward pass and concatenated
in the given order.
"""

import contextlib
import copy
import difflib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sktl._backbones.backbone import Backbone
from sktl._images.preprocessing import Preprocessing
from sktl._utils.keyed_cache import KeyedCache

PENULTIMATE = "penultimate"

_MAX_WIDTHS = 256  # combinations of layers, pooling and image size, per backbone
_widths: WeakKeyDictionary[Backbone, KeyedCache[Any, tuple[int, ...]]]
_widths = WeakKeyDictionary()


class FeatureExtractor(nn.Module):
    """A network that returns pooled activations of some layers instead of logits.

    It copies the network of the backbone, so hooks, fused layers and changes of the
    precision never affect the shared network.

    Parameters
    ----------
    backbone : Backbone
        Network, stages and last linear layer.
    layers : sequence of str
        ``"penultimate"``, names of stages, or names of modules. A name that a stage
        and a module have in common means the stage.
    pooling : {"avg", "max", "gem", "flatten"} or int
        See `pool`.
    on_meta : bool, default=False
        Whether the copied parameters and buffers are on the meta device: they have
        shapes, but no values and no memory.

    Attributes
    ----------
    widths : tuple of int
        Number of columns of each layer. Set by the first forward pass.

    Raises
    ------
    ValueError
        If the backbone has no layer of that name. The message has the closest names.
    """

    widths: tuple[int, ...]

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[str],
        pooling: str | int,
        *,
        on_meta: bool = False,
    ) -> None:
        super().__init__()
        self._layers = tuple(layers)
        self._pooling = pooling
        stages = backbone.staged_model.stages if backbone.staged_model else {}
        for layer in self._layers:
            _check_layer(layer, backbone, stages)

        memo = _meta_tensors(backbone.network) if on_meta else {}
        self._stages = [name for name in stages if name in self._layers]
        if len(self._stages) == len(self._layers):
            # Stages above the highest requested one are neither copied nor computed.
            n_stages = list(stages).index(self._stages[-1]) + 1
            needed = dict(list(stages.items())[:n_stages])
            self._parts = nn.ModuleDict(copy.deepcopy(needed, memo))
            network = None
        else:
            parts = {**stages, "head": backbone.head} if self._stages else {}
            # Copied in one call, so that modules stay shared between both.
            network, parts = copy.deepcopy((backbone.network, parts), memo)
            self._parts = nn.ModuleDict(parts or {"network": network})

        # Threads may use the extractor at the same time: each has its own results.
        self._pass = threading.local()
        for layer in self._layers:
            if layer in stages or network is None:
                continue
            if layer == PENULTIMATE:
                module = network.get_submodule(backbone.penultimate)
                module.register_forward_pre_hook(self._record_input(layer))
            else:
                channels_last = backbone.structure.is_channels_last(layer)
                module = network.get_submodule(layer)
                module.register_forward_hook(self._record_output(layer, channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, 3, h, w)`` to features ``(n, n_features)``, float32."""
        n = x.shape[0]
        rows: dict[str, Tensor] = {}
        self._pass.rows, self._pass.shapes = rows, {}
        for name, part in self._parts.items():
            x = part(x)
            if name in self._stages:
                self._record(name, x)
        for layer in self._layers:
            if layer not in rows:
                by_stage = " stage by stage" if self._stages else ""
                raise ValueError(
                    f"The module {layer!r} does not run when the network predicts"
                    f"{by_stage}, so it has no features. Choose another layer"
                    f"{', or join it by a FeatureUnion' if by_stage else ''}."
                )
            if rows[layer].shape[0] != n:
                raise ValueError(
                    f"The module {layer!r} must return one row per image. Got "
                    f"{rows[layer].shape[0]} rows for {n} images. Choose another layer."
                )
        columns = [rows[layer] for layer in self._layers]
        self.widths = tuple(column.shape[1] for column in columns)
        return torch.cat(columns, dim=1)  # (n, k_1), (n, k_2), ... -> (n, sum of k)

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the activations before pooling, in the last pass of this thread."""
        shapes: dict[str, tuple[int, ...]] = self._pass.shapes
        return shapes

    def _record(self, layer: str, x: Tensor) -> None:
        self._pass.shapes[layer] = tuple(x.shape)
        self._pass.rows[layer] = pool(x, self._pooling, layer)

    def _record_input(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._record(layer, inputs[0])

        return hook

    def _record_output(self, layer: str, channels_last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: object) -> None:
            if not isinstance(out, Tensor):
                raise ValueError(
                    f"The module {layer!r} must return a tensor to have features. Got "
                    f"{type(out).__name__}. Choose a module inside or above it."
                )
            if channels_last and out.ndim == 4:
                out = out.permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
            self._record(layer, out)

        return hook


def layer_widths(
    backbone: Backbone,
    layers: Sequence[str],
    pooling: str | int,
    preprocessing: Preprocessing,
) -> tuple[int, ...]:
    """Return the number of columns of each layer.

    The network runs once, on tensors without values where it supports them; the result
    is cached as long as the backbone is.

    Parameters
    ----------
    backbone, layers, pooling
        See `FeatureExtractor`.
    preprocessing : Preprocessing
        Determines the size of the images.

    Returns
    -------
    tuple of int
        In the order of `layers`.

    Raises
    ------
    ValueError
        If a layer is invalid, `pooling` does not apply to a layer, or the network does
        not support the size of the images.

    Warns
    -----
    UserWarning
        If `pooling` is an int and larger than the side of a layer.
    """
    layers, side = tuple(layers), preprocessing.crop_size
    cache = _widths.setdefault(backbone, KeyedCache(_MAX_WIDTHS))
    return cache.get_or_create(
        (layers, pooling, side),
        lambda: _measure_widths(backbone, layers, pooling, side),
    )


def _measure_widths(
    backbone: Backbone, layers: tuple[str, ...], pooling: str | int, side: int
) -> tuple[int, ...]:
    def run(device: str) -> FeatureExtractor:
        on_meta = device == "meta"
        extractor = FeatureExtractor(backbone, layers, pooling, on_meta=on_meta).eval()
        # Two images, to find layers that do not return one row per image.
        images = torch.zeros(2, 3, side, side, device=device)
        with torch.inference_mode(), reraise_invalid_size(side):
            extractor(images)
        return extractor

    try:
        extractor = run("meta")
    except Exception:
        # Broad on purpose: a forward method that reads values fails on the meta device
        # with exceptions of many types. The second pass raises all other errors.
        extractor = run("cpu")
    if isinstance(pooling, int):
        _warn_if_repeated(extractor.layer_shapes, pooling, side)
    return extractor.widths


def _warn_if_repeated(
    shapes: dict[str, tuple[int, ...]], pooling: int, image_size: int
) -> None:
    for layer, shape in shapes.items():
        n_positions = min(shape[2:]) if len(shape) == 4 else pooling
        if pooling > n_positions:
            warnings.warn(
                f"pooling={pooling} is larger than the side of the layer {layer!r}, "
                f"which has {shape[2]} x {shape[3]} positions for images of "
                f"{image_size} pixels a side, so its columns repeat values. Set "
                f"pooling to at most {n_positions}, increase image_size, or choose a "
                "lower layer.",
                UserWarning,
                stacklevel=2,
            )


@contextlib.contextmanager
def reraise_invalid_size(side: int) -> Iterator[None]:
    """Raise a RuntimeError of a forward pass as a ValueError about the image size.

    Parameters
    ----------
    side : int
        Side of the images in pixels, for the message.

    Raises
    ------
    ValueError
        Instead of a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"The network does not support images of {side} x {side} pixels: "
            f"{str(error).splitlines()[0]} Choose another image_size."
        ) from error


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


def _meta_tensors(network: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` that replaces all tensors by meta tensors."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return memo


def _check_layer(layer: str, backbone: Backbone, stages: dict[str, nn.Module]) -> None:
    """Raise if a backbone has no layer of that name."""
    modules = [name for name, _ in backbone.network.named_modules() if name]
    # Some networks have modules such as stage2 that are not the stage of that name. A
    # name of this form means the stage in all networks that have stages.
    is_stage_name = re.fullmatch(r"stem|stage\d+", layer) is not None
    if layer in stages or (layer in modules and not (is_stage_name and stages)):
        return
    if layer == PENULTIMATE:
        _ = backbone.penultimate  # raises if there is no linear layer
        return
    if is_stage_name:
        _ = backbone.stages  # raises if there are no stages
    close = difflib.get_close_matches(layer, [PENULTIMATE, *stages, *modules], n=5)
    raise ValueError(
        "The 'layer' parameter must be 'penultimate', the name of a stage "
        f"({', '.join(stages) or 'this network has none'}) or of a module of "
        f"{backbone.name!r}. Got {layer!r} instead."
        f"{' The closest names: ' + ', '.join(close) + '.' if close else ''}"
    )
