"""Structure of the networks of timm: trunk, neck and head, from recorded methods.

What their methods do is recorded and cut, so no architecture needs a description of its
own.
"""

import contextlib
import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sktl._backbones.source import NetworkStructure
from sktl._backbones.stages import group_blocks, map_side, n_halvings, stage_name
from sktl._backbones.steps import Ref, Step
from sktl._backbones.timm_methods import (
    WholeNetwork,
    features,
    has_class_token,
    logits,
    no_weight_decay,
    patch_size,
    penultimate,
    pools_other_tokens,
)
from sktl._backbones.traced import (
    Forward,
    MetaNetwork,
    Record,
    Values,
    meta_tensors,
    record,
)
from sktl._backbones.traced_blocks import Block, cut, layout_of
from sktl._images.preprocessing import Preprocessing

# Part of the keys of cached rows. It changes when a network is cut into other stages.
CUT_VERSION = "1"

_LARGE = 0.5  # share of the parameters with which a module is worth opening
_MAX_OPENED = 40
# Networks are recorded for images of this side at least: halves of small sides, which
# are rounded, would tell little about where the resolution halves.
_MIN_SIDE = 128

Pair = tuple[Tensor, Tensor]


def describe_network(
    network: nn.Module, preprocessing: Preprocessing
) -> NetworkStructure:
    """Describe a network of timm.

    Parameters
    ----------
    network : Module
        Network in evaluation mode; the values of its parameters are not read.
    preprocessing : Preprocessing
        Size and number of channels of its images, which may differ from those in its
        ``pretrained_cfg``.

    Returns
    -------
    NetworkStructure
        With the blocks of trunk, neck and head; or with the reason why there are none
        and, as the neck, the whole network up to its penultimate features.
    """
    kind = type(network).__name__
    inputs = _inputs(preprocessing)
    layers = _Layers(network, inputs[0])
    structure = _without_parts(network, layers)
    try:
        on_meta = MetaNetwork(network)
        trunk, sides, is_any_size = _trunk(
            on_meta, inputs, structure.has_fixed_image_size
        )
        neck, head = _neck_and_head(on_meta, trunk[-1].outputs)
    except Exception as error:
        # Broad on purpose: code of any architecture runs on symbols.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        return _not_staged(structure, network, f"a {kind} cannot be cut: {line}")
    modules = [block.module for block in trunk]
    groups = group_blocks(modules, sides)
    if len(groups) == 1:
        reason = (
            f"a {kind} has no layer between its first and its last one where a single "
            "tensor carries all features"
        )
        return _not_staged(structure, network, reason)
    if not _is_equivalent(network, [*trunk, *neck], inputs[1][0]):
        reason = f"the stages of a {kind} do not have the features of the network"
        return _not_staged(structure, network, reason)
    layers.groups = [[trunk[i] for i in group] for group in groups]
    return replace(
        structure,
        has_fixed_image_size=structure.has_fixed_image_size or not is_any_size,
        trunk=modules,
        trunk_sides=sides,
        trunk_channels_last=[block.layout == "NHWC" for block in trunk],
        trunk_prefix_tokens=[block.n_prefix for block in trunk],
        neck=[block.module for block in neck],
        head=[block.module for block in head],
    )


def _without_parts(network: Any, layers: "_Layers") -> NetworkStructure:
    """Return what is known about a network before it is cut."""
    config = getattr(network, "pretrained_cfg", None) or {}
    # Positions are interpolated for the size of the images.
    is_dynamic = getattr(network, "dynamic_img_size", False)
    return NetworkStructure(
        has_fixed_image_size=config.get("fixed_input_size", False) and not is_dynamic,
        side_multiple=patch_size(network.patch_embed) if is_dynamic else 1,
        is_channels_last=layers.is_channels_last,
        n_prefix_tokens=layers.n_prefix_tokens,
        has_class_token=has_class_token(network),
        pools_other_tokens=pools_other_tokens(network),
        no_weight_decay=no_weight_decay(network),
    )


def describe_layers(
    network: nn.Module, preprocessing: Preprocessing
) -> NetworkStructure:
    """Describe a network without cutting it; parameters as in `describe_network`."""
    return _without_parts(network, _Layers(network, _inputs(preprocessing)[0]))


def _not_staged(
    structure: NetworkStructure, network: nn.Module, reason: str
) -> NetworkStructure:
    neck = None
    # Broad on purpose: a registered network may fail in any way. Its penultimate
    # features are then the input of its last linear layer.
    with contextlib.suppress(Exception):
        neck = [WholeNetwork(network)]
    return replace(structure, neck=neck, reason_not_staged=reason)


class _Layers:
    """Layouts of the layers of a network, by name.

    Parameters
    ----------
    network : Module
        Network.
    images : (Tensor, Tensor)
        Images of two sizes, on the meta device.

    Attributes
    ----------
    groups : list of list of Block
        Blocks of each stage; empty if there are none.
    """

    def __init__(self, network: nn.Module, images: Pair) -> None:
        self._network, self._images = network, images
        self.groups: list[list[Block]] = []
        self._found: dict[str, tuple[str, int]] | None = None

    def is_channels_last(self, layer: str) -> bool | None:
        """Return whether maps of a layer are ``(n, h, w, c)``, or None."""
        if layer in self._stages:
            return False
        layout, _ = self._layouts.get(layer, (None, 0))
        return {"NHWC": True, "NCHW": False}.get(str(layout))

    def n_prefix_tokens(self, layer: str) -> int:
        """Return the number of class and register tokens of a layer."""
        if layer in self._stages:
            return self._stages[layer][-1].n_prefix
        return self._layouts.get(layer, (None, 0))[1]

    @property
    def _stages(self) -> dict[str, list[Block]]:
        return {stage_name(depth): group for depth, group in enumerate(self.groups)}

    @property
    def _layouts(self) -> dict[str, tuple[str, int]]:
        """Layout and number of prefix tokens of the output of each module."""
        # Not a cached property, whose lock all instances share in Python 3.11.
        if self._found is None:
            self._found = self._find_layouts()
        return self._found

    def _find_layouts(self) -> dict[str, tuple[str, int]]:
        on_meta = copy.deepcopy(self._network, meta_tensors(self._network))
        outputs: list[dict[str, Any]] = []

        def hook(name: str) -> Any:
            return lambda module, inputs, output: outputs[-1].update({name: output})

        for name, module in on_meta.named_modules():
            module.register_forward_hook(hook(name))
        for x in self._images:
            outputs.append({})
            # The network may support images of one size only, or read values.
            with torch.no_grad(), contextlib.suppress(Exception):
                on_meta(x)
        first, second = outputs
        batches = (len(self._images[0]), len(self._images[1]))
        found = {
            name: layout_of((first[name], second[name]), batches)
            for name in first.keys() & second.keys()
        }
        return {name: layout for name, layout in found.items() if layout is not None}


def _is_equivalent(network: nn.Module, blocks: list[Block], images: Tensor) -> bool:
    """Return whether blocks have the penultimate features of a network, for one image.

    Without values of the parameters there is nothing to compare.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images[:1].shape, generator=generator, dtype=torch.float32)
    with torch.inference_mode():
        expected = penultimate(network, features(network, x.clone()))
        for block in blocks:
            x = block.module(x)
    return x.shape == expected.shape and torch.allclose(
        x, expected, rtol=1e-4, atol=1e-5, equal_nan=True
    )


def _inputs(preprocessing: Preprocessing) -> tuple[Pair, Pair]:
    """Return images of two sizes, and of one for networks that support no other."""
    own = preprocessing.crop_size
    side = own * math.ceil(_MIN_SIDE / own)  # a multiple of the patches, too
    images, larger, small, equal = (
        torch.empty(
            n, preprocessing.n_channels, s, s, device="meta", dtype=torch.float32
        )
        for n, s in [(2, side), (3, 2 * side), (2, own), (3, own)]
    )
    return (images, larger), (small, equal)


def _trunk(
    on_meta: MetaNetwork, inputs: tuple[Pair, Pair], is_fixed: bool
) -> tuple[list[Block], list[float], bool]:
    """Return the blocks from the images to what `forward_features` returns.

    Also the sides of the images, and of the output of each block; and whether the
    blocks are those for images of any size. Those for one size may contain numbers
    that are wrong for others, so they are used only if there are no others.
    """
    (images, larger), one_size = inputs
    is_any_size = True
    try:
        blocks = _Opener(on_meta, features, (images, larger), _worth_opening).blocks()
    except Exception:
        # Broad on purpose: as above.
        if not is_fixed and _supports(on_meta, larger):
            raise
        is_any_size = False
        images, _ = one_size
        blocks = _Opener(on_meta, features, one_size, _worth_opening).blocks()
    tensors = [images, *(block.outputs[0] for block in blocks)]
    return blocks, [map_side(x) for x in tensors], is_any_size


def _supports(on_meta: MetaNetwork, images: Tensor) -> bool:
    """Return whether a network supports images of a size."""
    step = Step("module", ("", "forward_features"), (Ref(0),))
    with contextlib.suppress(Exception):  # of any type, from code of any architecture
        on_meta.run(step, lambda index: images)
        return True
    return False


def _neck_and_head(
    on_meta: MetaNetwork, inputs: Pair
) -> tuple[list[Block], list[Block]]:
    """Return the blocks from there to penultimate features and to the outputs."""
    neck = _Opener(on_meta, penultimate, inputs, _with_argument)
    head = _Opener(on_meta, logits, inputs, lambda opener: ())
    blocks = neck.blocks()
    head.opened = neck.opened
    return blocks, head.blocks()


class _Opener:
    """Records a function, and opens modules as long as this gives more blocks.

    Parameters
    ----------
    on_meta, forward, inputs
        As in `record`.
    worth_opening : callable
        Takes the opener; returns names of modules.

    Attributes
    ----------
    opened, closed : set of str
        Names of modules that are recorded step by step, and that cannot be.
    last : Record
        The last valid record.
    """

    def __init__(
        self,
        on_meta: MetaNetwork,
        forward: Forward,
        inputs: Pair,
        worth_opening: Any,
    ) -> None:
        self.on_meta, self.forward, self.inputs = on_meta, forward, inputs
        self.network = on_meta.network
        self._worth_opening = worth_opening
        self.opened: set[str] = set()
        self.closed: set[str] = set()

    def blocks(self) -> list[Block]:
        """Return the blocks."""
        self.last = self._record(self.opened)
        blocks = cut(self.network, self.last)
        for _ in range(_MAX_OPENED):
            names = set(self._worth_opening(self)) - self.opened - self.closed
            if not names:
                break
            name = min(names)
            opened = self._blocks_if_opened(name)
            if opened is None:
                self.closed.add(name)
            else:
                self.opened.add(name)
                blocks = opened
        return blocks

    def _blocks_if_opened(self, name: str) -> list[Block] | None:
        """Return the blocks with another module recorded step by step, if possible."""
        try:
            opened = self._record({*self.opened, name})
            blocks = cut(self.network, opened)
        except Exception:
            # Broad on purpose: code of any architecture runs on symbols.
            return None
        self.last = opened
        return blocks

    def _record(self, opened: set[str]) -> Record:
        """Record the function; raise if it has other steps in training."""
        arguments = (self.on_meta, self.forward, self.inputs, opened)
        records = [record(*arguments, training=mode) for mode in (False, True)]
        steps = [[*map(str, each.steps), str(each.output)] for each in records]
        if steps[0] != steps[1]:
            raise TypeError("its forward method depends on the mode")
        return records[0]

    def input(self, step: Step) -> Values:
        """Return the first input of a step."""
        refs = step.refs()
        return self.last.values[refs[0]] if refs else (None, None)

    def side(self, values: Values) -> float:
        """Return the side of a map, or 0 for anything else."""
        if isinstance(values[0], tuple | list) and values[0]:  # a map and its sides
            values = (values[0][0], values[1][0])
        layout = layout_of(values, (len(self.inputs[0]), len(self.inputs[1])))
        return 0 if layout in (None, ("NC", 0)) else map_side(values[0])

    def calls(self) -> list[tuple[str, nn.Module, Step, Any]]:
        """Return the calls of modules: name, module, step and results."""
        pairs = zip(self.last.steps, self.last.values, strict=True)
        return [
            (step.target[0], self.network.get_submodule(step.target[0]), step, values)
            for step, values in pairs
            if step.kind == "module" and step.target[1] == "__call__"
        ]


def _worth_opening(opener: _Opener) -> list[str]:
    """Return modules with a large part of a trunk, or with several resolutions."""
    calls = opener.calls()
    total = sum(_n_parameters(module) for _, module, _, _ in calls)
    names = []
    n_before = 0
    for name, module, step, results in calls:
        n_own = _n_parameters(module)
        is_large = n_own > _LARGE * total
        # The first one may be the embedding of patches, which is the stem.
        if n_before and n_own and not is_large:
            sides = [opener.side(values) for values in (opener.input(step), results)]
            is_large = 0 not in sides and n_halvings(*sides) >= 2
        if is_large and any(True for _ in module.children()):
            names.append(name)
        n_before += n_own
    return names


def _with_argument(opener: _Opener) -> list[str]:
    """Return modules that know themselves what penultimate features are."""
    return [
        name
        for name, _, step, _ in opener.calls()
        if "pre_logits" in (step.kwargs or {})
    ]


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
