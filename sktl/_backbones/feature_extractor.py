"""Feature extraction: the activations of layers, pooled to one vector per image.

A layer is ``"penultimate"`` (the input of the last linear layer of the network), the
name of a stage, or the name of any module of the network. The activations of a layer
are pooled to a vector; several layers are computed in one forward pass and concatenated
in the given order.
"""

import contextlib
import copy
import difflib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sktl._backbones.backbone import Backbone
from sktl._backbones.layouts import is_channels_last
from sktl._backbones.pooling import patch_map, pool
from sktl._backbones.stages import is_stage_name
from sktl._backbones.traced import meta_tensors
from sktl._images.preprocessing import Preprocessing
from sktl._utils.default_dtype import float32_default_if_needed
from sktl._utils.keyed_cache import KeyedCache

PENULTIMATE = "penultimate"

_MAX_WIDTHS = 256  # combinations of layers, pooling and image size, per backbone
_widths: WeakKeyDictionary[Backbone, KeyedCache[Any, tuple[int, ...]]]
_widths = WeakKeyDictionary()
_layouts: WeakKeyDictionary[Backbone, dict[str, bool]] = WeakKeyDictionary()


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
    pooling : {"avg", "max", "gem", "cls", "flatten"} or int
        See `sktl._backbones.pooling`.
    on_meta : bool, default=False
        Whether the copied parameters and buffers are on the meta device: they have
        shapes, but no values and no memory.
    channels_last : mapping of str to bool, default=None
        Whether activations with four axes are ``(n, h, w, c)``, for each layer. None:
        as the source of the backbone says, or as it is measured.

    Attributes
    ----------
    widths : tuple of int
        Number of columns of each layer. Set by the first forward pass.

    Raises
    ------
    ValueError
        If the backbone has no layer of that name, where the message has the closest
        names, or `pooling` does not apply to the penultimate layer.
    """

    widths: tuple[int, ...]

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[str],
        pooling: str | int,
        *,
        on_meta: bool = False,
        channels_last: Mapping[str, bool] | None = None,
    ) -> None:
        super().__init__()
        self._layers = tuple(layers)
        self._pooling = pooling
        stages = backbone.staged_model.stages if backbone.staged_model else {}
        for layer in self._layers:
            _check_layer(layer, backbone, stages)
        self._channels_last = channels_last or _channels_last(backbone, self._layers)
        structure = backbone.structure
        self._n_prefix_tokens = {n: structure.n_prefix_tokens(n) for n in self._layers}
        self._has_class_token = structure.has_class_token
        is_pooled = PENULTIMATE in self._layers and structure.pools_other_tokens
        if pooling == "cls" and is_pooled:
            raise ValueError(
                f"pooling='cls' needs a layer with a class token. Got {PENULTIMATE!r} "
                f"of {backbone.name!r}, whose features are pooled from other tokens. "
                "Choose a stage or a module of it, or another pooling."
            )

        memo = meta_tensors(backbone.network) if on_meta else {}
        parts = dict(stages)
        if backbone.neck is not None:
            parts[PENULTIMATE] = backbone.neck
        self._of_parts = [name for name in parts if name in self._layers]
        if len(self._of_parts) == len(self._layers):
            # Parts above the highest requested one are neither copied nor computed.
            n_parts = list(parts).index(self._of_parts[-1]) + 1
            needed = dict(list(parts.items())[:n_parts])
            self._parts = nn.ModuleDict(copy.deepcopy(needed, memo))
            network = None
        else:
            if not self._of_parts:
                parts = {}
            elif stages:
                parts["head"] = backbone.head
            # Copied in one call, so that modules stay shared between both.
            network, parts = copy.deepcopy((backbone.network, parts), memo)
            if "head" not in parts:
                parts["network"] = network
            self._parts = nn.ModuleDict(parts)

        # Threads may use the extractor at the same time: each has its own results.
        self._pass = threading.local()
        for layer in self._layers:
            if layer in self._of_parts or network is None:
                continue
            if layer == PENULTIMATE:
                module = network.get_submodule(backbone.penultimate)
                module.register_forward_pre_hook(self._record_input(layer))
            else:
                module = network.get_submodule(layer)
                module.register_forward_hook(self._record_output(layer))
        if network is not None:
            self._refuse_layers_above(network, backbone)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, 3, h, w)`` to features ``(n, n_features)``, float32."""
        n = x.shape[0]
        rows: dict[str, Tensor] = {}
        self._pass.rows, self._pass.shapes = rows, {}
        self._pass.lacks_weights = ""
        for name, part in self._parts.items():
            if name == "network" and all(layer in rows for layer in self._layers):
                break  # it shares modules with the neck, whose hooks have recorded all
            if name == PENULTIMATE:  # beside the way from stages to the outputs
                if name in self._of_parts:
                    self._record(name, part(x))
                continue
            x = part(x)
            if name in self._of_parts:
                self._record(name, x)
        for layer in self._layers:
            if layer not in rows:
                by_stage = " stage by stage" if self._of_parts else ""
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

    def _refuse_layers_above(self, network: nn.Module, backbone: Backbone) -> None:
        """Raise in the forward pass for layers that need weights that are missing."""
        for name in backbone.missing_head:
            reason = (
                f"requires {name}, which is missing in the weights of "
                f"{backbone.name!r}. Choose a stage or another layer below, or weights "
                "with a head."
            )

            def hook(*arguments: object, reason: str = reason) -> None:
                self._pass.lacks_weights = self._pass.lacks_weights or reason

            module = network.get_submodule(name.rpartition(".")[0])
            # After the hook of the penultimate layer, which records the input.
            module.register_forward_pre_hook(hook)

    def _record(self, layer: str, x: Tensor) -> None:
        if self._pass.lacks_weights:
            raise ValueError(f"The layer {layer!r} {self._pass.lacks_weights}")
        if x.ndim == 4 and self._channels_last[layer]:
            x = x.permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
        n_prefix = self._n_prefix_tokens[layer]
        if x.ndim == 3 and isinstance(self._pooling, int):
            x = patch_map(x, n_prefix, layer)
        self._pass.shapes[layer] = tuple(x.shape)
        self._pass.rows[layer] = pool(
            x,
            self._pooling,
            layer,
            n_prefix_tokens=n_prefix,
            has_class_token=self._has_class_token,
        )

    def _record_input(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._record(layer, inputs[0])

        return hook

    def _record_output(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: object) -> None:
            if not isinstance(out, Tensor):
                raise ValueError(
                    f"The module {layer!r} must return a tensor to have features. Got "
                    f"{type(out).__name__}. Choose a module inside or above it."
                )
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
        images = _black_images(backbone, side, device)
        dtype = float32_default_if_needed()
        with torch.inference_mode(), reraise_invalid_size(side), dtype:
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


def _channels_last(backbone: Backbone, layers: Sequence[str]) -> dict[str, bool]:
    """Return whether activations with four axes are ``(n, h, w, c)``, by layer."""
    known = _layouts.setdefault(backbone, {})
    unknown = []
    for layer in layers:
        if layer == PENULTIMATE:
            known[layer] = backbone.neck is None and isinstance(
                backbone.last_linear, nn.Linear
            )
        elif layer not in known:
            found = backbone.structure.is_channels_last(layer)
            if found is None:
                unknown.append(layer)
            else:
                known[layer] = found
    if unknown:
        known.update(_measure_layouts(backbone, unknown))
    return {layer: known[layer] for layer in layers}


def _measure_layouts(backbone: Backbone, layers: Sequence[str]) -> dict[str, bool]:
    """Determine the axes of layers from images of two sizes."""
    network, side = backbone.network, backbone.preprocessing.crop_size
    shapes, larger = (_measure_shapes(backbone, layers, s) for s in (side, 2 * side))
    layouts = {}
    for layer in layers:
        shape = shapes.get(layer, ())
        if len(shape) != 4:  # or it does not run, which the forward pass reports
            layouts[layer] = False
            continue
        stages = backbone.staged_model.stages if backbone.staged_model else {}
        module = stages[layer] if layer in stages else network.get_submodule(layer)
        found = is_channels_last(module, shape, larger.get(layer))
        if found is None and backbone.definition.layout is None:
            raise ValueError(
                f"The layer {layer!r} of {backbone.name!r} has activations of shape "
                f"{shape[1:]} per image for every size of the images, so its channel "
                "axis is not known. Pass layout='NCHW' or layout='NHWC' to "
                "register_backbone, or choose another layer."
            )
        is_nhwc = backbone.definition.layout == "NHWC"
        layouts[layer] = is_nhwc if found is None else found
    return layouts


def _measure_shapes(
    backbone: Backbone, layers: Sequence[str], side: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of layers for two images, as far as the network supports it."""
    shapes: dict[str, tuple[int, ...]] = {}
    as_they_are = dict.fromkeys(layers, False)
    for device in ("meta", "cpu"):
        extractor = FeatureExtractor(
            backbone,
            layers,
            "flatten",
            on_meta=device == "meta",
            channels_last=as_they_are,
        ).eval()
        images = _black_images(backbone, side, device)
        # A network may read values, which meta tensors do not have, or support images
        # of one size only; the layers before that are recorded.
        with (
            torch.inference_mode(),
            float32_default_if_needed(),
            contextlib.suppress(Exception),
        ):
            extractor(images)
        shapes |= extractor.layer_shapes
        if len(shapes) == len(layers):
            break
    return shapes


def _black_images(backbone: Backbone, side: int, device: str) -> Tensor:
    shape = (2, backbone.preprocessing.n_channels, side, side)
    return torch.zeros(shape, device=device, dtype=torch.float32)


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
    """Raise an error of a forward pass as a ValueError about the image size.

    Parameters
    ----------
    side : int
        Side of the images in pixels, for the message.

    Raises
    ------
    ValueError
        Instead of a RuntimeError of torch or an AssertionError of the network.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The network does not support images of {side} x {side} pixels: "
            f"{line.rstrip('.')}. Choose another image_size."
        ) from error


def _check_layer(layer: str, backbone: Backbone, stages: dict[str, nn.Module]) -> None:
    """Raise if a backbone has no layer of that name."""
    modules = [name for name, _ in backbone.network.named_modules() if name]
    # Some networks have modules such as stage2 that are not the stage of that name. A
    # name of this form means the stage in all networks that have stages.
    means_stage = is_stage_name(layer)
    if layer in stages or (layer in modules and not (means_stage and stages)):
        return
    if layer == PENULTIMATE:
        if backbone.neck is None:
            _ = backbone.penultimate  # raises if there is no linear layer
        elif backbone.missing_below_penultimate:
            raise ValueError(
                f"The layer {layer!r} requires "
                f"{backbone.missing_below_penultimate[0]}, which is missing in the "
                f"weights of {backbone.name!r}. Choose a stage or another layer "
                "below, or weights with a head."
            )
        return
    if means_stage:
        _ = backbone.stages  # raises if there are no stages
    close = difflib.get_close_matches(layer, [PENULTIMATE, *stages, *modules], n=5)
    raise ValueError(
        "The 'layer' parameter must be 'penultimate', the name of a stage "
        f"({', '.join(stages) or 'this network has none'}) or of a module of "
        f"{backbone.name!r}. Got {layer!r} instead."
        f"{' The closest names: ' + ', '.join(close) + '.' if close else ''}"
        f" describe_backbone({backbone.name!r}) shows the stages, or why it has none."
    )
