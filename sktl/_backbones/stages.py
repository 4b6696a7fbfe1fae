"""Split networks into stages, so that depth has one meaning in every architecture.

A stage ends where the resolution halves. A network is a sequence of blocks; a block
whose output has half the side of its input begins a new stage, and a block that reduces
the side to a quarter (a patch embedding) is a stage of its own. Blocks without
parameters never form a stage of their own: a pooling layer at the end belongs to the
stage before it. The first stage is called ``stem``, the others ``stage1``, ``stage2``,
... In a ResNet these are conv1 to conv5_x of the paper.

Stages share their modules with the network: freezing, training or moving a stage does
the same to the network.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from sktl._backbones.source import NetworkStructure
from sktl._backbones.unwrap import Head

# Names with another meaning where the name of a stage is expected.
_RESERVED = {"head", "neck", "network", "penultimate"}


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
    """

    stages: dict[str, nn.Module]
    head: nn.Module

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


def split_into_stages(structure: NetworkStructure, image_size: int) -> StagedModel:
    """Split a network into stages and a head.

    Parameters
    ----------
    structure : NetworkStructure
        Of a network in evaluation mode, on any device; the values of its parameters
        are not read.
    image_size : int
        Side in pixels of the images for which the resolutions are measured.

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
        return StagedModel(dict(structure.stages), head)
    groups = _group(structure.trunk, image_size)
    head_blocks = list(structure.head)
    if structure.is_trunk_channels_last:
        # Blocks pass (n, h, w, c); input and output of a stage are (n, c, h, w).
        to_last, to_first = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
        groups = [[to_last, *group, to_first] for group in groups]
        del groups[0][0]
        head_blocks = [to_last, *head_blocks]
    sequences = (nn.Sequential(*group) for group in groups)
    return StagedModel(_named(sequences), nn.Sequential(*head_blocks))


def check_staged_model(
    network: nn.Module, staged: StagedModel, image_size: int
) -> None:
    """Raise if stages and head are not equivalent to the network.

    Parameters
    ----------
    network : Module
        In evaluation mode, on the CPU.
    staged : StagedModel
        Its stages and head.
    image_size : int
        Side in pixels of the random images for which outputs are compared.

    Raises
    ------
    ValueError
        If a parameter of a stage is not one of the network, or the outputs differ by
        more than the rounding errors of float32.
    """
    kind = type(network).__name__
    known = set(network.parameters())
    if any(not known.issuperset(part.parameters()) for part in staged.stages.values()):
        raise ValueError(
            f"The `stages` of a {kind} must be its own modules; otherwise training the "
            "stages does not train the network. Got parameters that are not in its "
            "`parameters()`. Make `stages` a ModuleDict or a ModuleList."
        )
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, image_size, image_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    cause: Exception | None = None
    with torch.inference_mode():
        expected = network(x.clone())
        try:
            is_same = _is_close(staged(x.clone()), expected)
        except Exception as error:  # wrong modules may raise anything
            is_same, cause = False, error
    if not is_same:
        calls = [_record_calls(network, run, x) for run in (network, staged)]
        raise ValueError(
            f"The `stages` of a {kind}, run in order, followed by its `head`, must "
            f"have the output of the network. Got {_first_difference(*calls)}. Each "
            "operation of `forward` must be a module of a stage or of the head."
        ) from cause


def check_stage_name(name: object) -> None:
    """Raise a ValueError if a stage cannot have this name."""
    if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
        raise ValueError(
            "The name of a stage must be one word such as 'stage1', other than "
            f"{', '.join(sorted(_RESERVED))}. Got {name!r}."
        )


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
    scope = structure.head if is_staged else [network]
    searched = {module for block in scope for module in block.modules()}
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


def _record_calls(
    network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> list[tuple[str, Tensor]]:
    """Return the names and inputs of the modules that run, in the order of the calls.

    These are the modules of the network without children. At the end is the output of
    the run, with an empty name, unless it raised an exception.
    """
    calls: list[tuple[str, Tensor]] = []

    def record(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            calls.append((name, inputs[0].clone()))

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=n: record(name, inputs))
        for n, module in network.named_modules()
        if n and next(module.children(), None) is None
    ]
    # The caller reports the exception.
    with torch.inference_mode(), contextlib.suppress(Exception):
        calls.append(("", run(x.clone())))
    for hook in hooks:
        hook.remove()
    return calls


def _first_difference(
    expected: list[tuple[str, Tensor]], got: list[tuple[str, Tensor]]
) -> str:
    """Describe the first call of two runs that is not the same."""
    before = "at the beginning"
    for (name, wanted), (other, found) in zip(expected, got, strict=False):
        if other != name:
            runs = repr(other) if other else "no other module"
            return f"{before} {runs}, where the network runs {name or 'none'!r}"
        what = f"the input of {name!r}" if name else "the output"
        if found.shape != wanted.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
            return f"{what} with the shape {shapes}"
        if not _is_close(found, wanted):
            return f"{what} with other values, {before}"
        before = f"after {name!r}"
    return f"an error {before}"


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True
    )


def _own_stages(stages: Any) -> dict[str, nn.Module]:
    """Return the stages by name; raise if a stage or its name is invalid."""
    is_mapping = isinstance(stages, nn.ModuleDict | Mapping)
    named = dict(stages.items()) if is_mapping else _named(stages)
    for name, stage in named.items():
        check_stage_name(name)
        if not isinstance(stage, nn.Module):
            raise ValueError(
                "The `stages` of a network must be modules. Got "
                f"{name!r}: a {type(stage).__name__}."
            )
    return named


def _named(stages: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {
        f"stage{depth}" if depth else "stem": stage
        for depth, stage in enumerate(stages)
    }


def _group(blocks: Sequence[nn.Module], image_size: int) -> list[list[nn.Module]]:
    """Group blocks into stages."""
    runs: list[list[nn.Module]] = [[]]
    for block, halvings in zip(blocks, _halvings(blocks, image_size), strict=True):
        if halvings >= 1:
            runs.append([])
        runs[-1].append(block)
        if halvings >= 2:
            runs.append([])
    stages: list[list[nn.Module]] = [[]]
    for run in runs:
        if _has_parameters(run) and _has_parameters(stages[-1]):
            stages.append([])
        stages[-1].extend(run)
    return stages


def _halvings(blocks: Sequence[nn.Module], image_size: int) -> list[int]:
    """Return how many times each block halves the resolution."""
    # Tensors on the meta device have shapes, but no values: this is fast, and works
    # before the weights are loaded.
    halvings = []
    x = torch.empty(1, 3, image_size, image_size, device="meta", dtype=torch.float32)
    with torch.no_grad():
        for block in blocks:
            # The last but one axis is a side in (n, c, h, w) and in (n, h, w, c).
            before = x.shape[-2]
            tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
            on_meta = {name: value.to("meta") for name, value in tensors.items()}
            x = torch.func.functional_call(block, on_meta, (x,))
            # Rounded: a pooling layer without padding reduces 13 to 6.
            halvings.append(round(math.log2(before / x.shape[-2])))
    return halvings


def _has_parameters(blocks: list[nn.Module]) -> bool:
    return any(True for block in blocks for _ in block.parameters())
