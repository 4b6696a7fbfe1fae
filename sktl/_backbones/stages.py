"""Split networks into stages, so that depth has one meaning in every architecture.

A stage ends where the resolution halves. A network is a sequence of blocks; a block
whose output has half the side of its input begins a new stage, and a block that reduces
the side to a quarter (a patch embedding) is a stage of its own. Blocks without
parameters never form a stage of their own: a pooling layer at the end belongs to the
stage before it. The first stage is called ``stem``, the others ``stage1``, ``stage2``,
... In a ResNet these are conv1 to conv5_x of the paper. A network that keeps one
resolution after its stem, such as a vision transformer, has four stages with equal
numbers of blocks.

Stages share their modules with the network: freezing, training or moving a stage does
the same to the network.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from sktl._backbones.source import NetworkStructure
from sktl._backbones.unwrap import Head

# Names with another meaning where the name of a stage is expected.
_RESERVED = {"head", "neck", "network", "no_weight_decay", "penultimate"}
_N_EQUAL_STAGES = 4  # of a network that keeps one resolution, after its stem
_LARGE_BLOCK = 0.25  # size of a block that counts, relative to the largest one


@dataclass(frozen=True, eq=False)
class StagedModel:
    """A network as stages and a head.

    Attributes
    ----------
    stages : dict of str to Module
        In the order in which they run; input and output are ``(n, c, h, w)``.
    head : Module
        From the output of the last stage to that of the network: pooling, flattening
        and the classifier.
    neck : Module or None
        From the output of the last stage to the penultimate features; None if these
        are the input of the last linear layer of the head.
    """

    stages: dict[str, nn.Module]
    head: nn.Module
    neck: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Run stages and head: the output of the network for ``(n, 3, h, w)``."""
        for stage in self.stages.values():
            x = stage(x)
        logits: Tensor = self.head(x)
        return logits


def describe_network(network: nn.Module) -> NetworkStructure:
    """Describe a network by its attributes ``stages`` and ``head``.

    Parameters
    ----------
    network : Module
        With an attribute ``stages``, a ModuleDict or a sequence of modules, and an
        attribute ``head``, a module; or any other network, which cannot be split.

    Returns
    -------
    NetworkStructure
        With these stages and this head, or with the reason why there are none.

    Raises
    ------
    ValueError
        If a stage is not a module, or its name is invalid.
    """
    stages, head = getattr(network, "stages", None), getattr(network, "head", None)
    if isinstance(head, nn.Module) and isinstance(
        stages, nn.ModuleDict | nn.ModuleList | nn.Sequential | Mapping | list | tuple
    ):
        return NetworkStructure(stages=_own_stages(stages), head=[head])
    return NetworkStructure(
        reason_not_staged=(
            f"a {type(network).__name__} is not a class of torchvision.models that can "
            "be split, and it has no attributes `stages` (a ModuleDict, or modules in "
            "order) and `head` that define how to split it"
        )
    )


def split_into_stages(
    structure: NetworkStructure, image_size: int, n_channels: int = 3
) -> StagedModel:
    """Split a network into stages and a head.

    Parameters
    ----------
    structure : NetworkStructure
        Of a network in evaluation mode, on any device; the values of its parameters
        are not read.
    image_size : int
        Side in pixels of the images for which the resolutions are measured.
    n_channels : int, default=3
        Number of channels of the images.

    Returns
    -------
    StagedModel
        It consists of the modules of the network.

    Raises
    ------
    ValueError
        If the network cannot be split.
    """
    if structure.reason_not_staged is not None:
        raise ValueError(f"No stages: {structure.reason_not_staged}.")
    if structure.stages is not None:
        (head,) = structure.head
        neck = None if structure.neck is None else nn.Sequential(*structure.neck)
        return StagedModel(dict(structure.stages), head, neck)
    blocks = structure.trunk
    sides = structure.trunk_sides
    if sides is None:
        sides = _measure_sides(blocks, image_size, n_channels)
    sequences = []
    before: list[nn.Module] = []
    for group in group_blocks(blocks, sides):
        modules = [*before, *(blocks[index] for index in group)]
        before = []
        if structure.trunk_channels_last and structure.trunk_channels_last[group[-1]]:
            # Blocks pass (n, h, w, c); input and output of a stage are (n, c, h, w).
            modules.append(Permute([0, 3, 1, 2]))
            before = [Permute([0, 2, 3, 1])]
        sequences.append(nn.Sequential(*modules))
    neck = None
    if structure.neck is not None:
        neck = nn.Sequential(*before, *structure.neck)
    head = nn.Sequential(*before, *structure.head)
    return StagedModel(_named(sequences), head, neck)


def check_stage_name(name: object) -> None:
    """Raise a ValueError if a stage cannot have this name."""
    is_word = isinstance(name, str) and name.isidentifier()
    # Stages become children of these, which then must not have the attribute.
    containers = (nn.ModuleDict(), nn.Sequential())
    if (
        not is_word
        or name in _RESERVED
        or any(hasattr(container, str(name)) for container in containers)
    ):
        raise ValueError(
            "The name of a stage must be one word such as 'stage1', other than "
            f"{', '.join(sorted(_RESERVED))}, and no attribute of a torch module. Got "
            f"{name!r}."
        )


def is_stage_name(layer: str) -> bool:
    """Return whether the name of a layer means a stage in networks with stages."""
    return re.fullmatch(r"stem|stage\d+", layer) is not None


def last_linear(network: nn.Module, structure: NetworkStructure) -> str | None:
    """Return the name of the last linear layer: its input is the penultimate feature.

    Parameters
    ----------
    network : Module
        Any network. If it can be split, only its head is searched.
    structure : NetworkStructure
        Its structure.

    Returns
    -------
    str or None
        Name in ``network.named_modules()`` of an ``nn.Linear``, or of an
        ``nn.Conv2d`` if a head has no linear layer (SqueezeNet, whose penultimate
        feature is a map ``(n, 512, h, w)``); None if there is neither.
    """
    is_staged = structure.reason_not_staged is None
    types = (nn.Linear, nn.Conv2d) if is_staged else (nn.Linear,)
    searched = _modules(structure.head if is_staged else [network])
    if structure.neck is not None:
        # Layers of the neck are below the penultimate features. It may consist of
        # other modules with the same parameters.
        below = {p for block in structure.neck for p in block.parameters()}
        searched = {m for m in searched if below.isdisjoint(m.parameters())}
    for type_ in types:
        names = [
            name
            for name, module in network.named_modules()
            if module in searched and isinstance(module, type_)
        ]
        if names:
            return names[-1]
    return None


def find_head(network: nn.Module, structure: NetworkStructure) -> Head:
    """Return the names of the tensors at the end of a network.

    Parameters
    ----------
    network, structure
        As in `last_linear`.

    Returns
    -------
    Head
        Without names if the network has no last linear layer.
    """
    layer = last_linear(network, structure)
    if layer is None:
        return Head()
    names = list(network.state_dict())
    last = frozenset(name for name in names if name.startswith(f"{layer}."))
    tensors = last
    if structure.reason_not_staged is None:
        below = _modules([*structure.trunk, *(structure.stages or {}).values()])
        inside = _modules(structure.head) - below
        owners = {n: network.get_submodule(n.rpartition(".")[0]) for n in names}
        tensors = frozenset(name for name in names if owners[name] in inside)
    root = layer
    while parent := root.rpartition(".")[0]:
        if any(n.startswith(f"{parent}.") and n not in tensors for n in names):
            break
        root = parent
    return Head(root, tensors, last)


def _modules(blocks: Iterable[nn.Module]) -> set[nn.Module]:
    return {module for block in blocks for module in block.modules()}


def _own_stages(stages: Any) -> dict[str, nn.Module]:
    """Return the stages by name; raise if a stage or its name is invalid."""
    is_mapping = isinstance(stages, nn.ModuleDict | Mapping)
    named = dict(stages.items()) if is_mapping else _named(stages)
    for name, stage in named.items():
        check_stage_name(name)
        if not isinstance(stage, nn.Module):
            raise ValueError(
                "The `stages` of a network must be modules. Got "
                f"{name!r}: a {type(stage).__name__}. Make each stage an nn.Module."
            )
    return named


def _named(stages: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {stage_name(depth): stage for depth, stage in enumerate(stages)}


def stage_name(depth: int) -> str:
    """Return the name of a stage, counted from 0."""
    return f"stage{depth}" if depth else "stem"


def group_blocks(
    blocks: Sequence[nn.Module], sides: Sequence[float]
) -> list[list[int]]:
    """Group blocks into stages.

    Parameters
    ----------
    blocks : sequence of Module
        In the order in which they run.
    sides : sequence of float
        Side of the input of the first block, then that of the output of each block.

    Returns
    -------
    list of list of int
        Indices of the blocks of each stage.
    """
    runs: list[list[int]] = [[]]
    for index, (before, after) in enumerate(pairwise(sides)):
        halvings = n_halvings(before, after)
        if halvings >= 1:
            runs.append([])
        runs[-1].append(index)
        if halvings >= 2:
            runs.append([])
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    stages: list[list[int]] = [[]]
    for run in runs:
        if any(sizes[i] for i in run) and any(sizes[i] for i in stages[-1]):
            stages.append([])
        stages[-1].extend(run)
    if len(stages) == 2:
        # One resolution, as in a vision transformer.
        # Positions are parameters of the network itself, not of a layer.
        in_layers = [
            sum(p.numel() for child in block.children() for p in child.parameters())
            for block in blocks
        ]
        stages = _equal_stages(stages[0], stages[1], in_layers)
    return stages


def _equal_stages(
    stem: list[int], others: list[int], sizes: Sequence[int]
) -> list[list[int]]:
    """Split the blocks after a stem into stages of the same number of large blocks."""
    threshold = _LARGE_BLOCK * max(sizes[index] for index in others)
    starts = [i for i in others if sizes[i] >= threshold]
    if len(starts) < _N_EQUAL_STAGES:
        return [stem, others]
    bounds = [
        starts[len(starts) * k // _N_EQUAL_STAGES] for k in range(_N_EQUAL_STAGES)
    ]
    ends = [*bounds[1:], others[-1] + 1]
    stages = [list(range(*span)) for span in zip(bounds, ends, strict=True)]
    return [[*stem, *range(others[0], bounds[0])], *stages]


def n_halvings(before: float, after: float) -> int:
    """Return how many times a side is halved."""
    # Rounded: a pooling layer without padding reduces 13 to 6.
    return round(math.log2(before / after))


def map_side(x: Tensor) -> float:
    """Return the side of a map, or of that whose positions are tokens.

    Parameters
    ----------
    x : Tensor of shape (n, c, h, w), (n, h, w, c) or (n, tokens, c)
        Activations. Class tokens among many others have little effect.
    """
    # The last but one axis is a side in (n, c, h, w) and in (n, h, w, c).
    return math.sqrt(x.shape[1]) if x.ndim == 3 else x.shape[-2]


def _measure_sides(
    blocks: Sequence[nn.Module], image_size: int, n_channels: int
) -> list[float]:
    """Return the sides of the input of the first block, and of all outputs."""
    # Tensors on the meta device have shapes, but no values: this is fast, and works
    # before the weights are loaded.
    shape = (1, n_channels, image_size, image_size)
    x = torch.empty(shape, device="meta", dtype=torch.float32)
    sides = [map_side(x)]
    with torch.no_grad():
        for block in blocks:
            tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
            on_meta = {name: value.to("meta") for name, value in tensors.items()}
            x = torch.func.functional_call(block, on_meta, (x,))
            sides.append(map_side(x))
    return sides
