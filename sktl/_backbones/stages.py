"""Cuts a network into stages, so that depth means the same in every architecture.

The rule: a stage ends where the resolution halves. The network is taken as a row of
blocks; a block whose output has half the side of its input begins a new stage, and a
block that quarters it (a patch embedding) is a stage for itself, since a stage ends
before it and another one inside it. Blocks without parameters never make a stage of
their own: a pooling layer at the very end belongs to what it pools. The first stage is
called ``stem``, the others ``stage1``, ``stage2``, … For a ResNet this gives what its
authors call conv1 to conv5_x.

The modules are shared with the network, not copied: freezing, training or moving a
stage does the same to the network.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import Permute

# Names with another meaning where a stage can be asked for.
_RESERVED = {"head", "network", "penultimate"}


@dataclass(frozen=True, eq=False)
class StagedModel:
    """A network as stages and a head.

    Attributes
    ----------
    stages : dict of str to Module
        In the order in which they run; each takes and gives ``(n, c, h, w)``.
    head : Module
        From the output of the last stage to that of the network: pooling, flattening
        and the classifier.
    """

    stages: dict[str, nn.Module]
    head: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """Run stages and head: ``(n, 3, h, w)`` to what the network gives for it."""
        for stage in self.stages.values():
            x = stage(x)
        logits: Tensor = self.head(x)
        return logits


class _Renormalize(nn.Module):
    """ImageNet's mean and deviation to 0.5 and 0.5, as GoogLeNet and Inception do."""

    def forward(self, x: Tensor) -> Tensor:
        # Plain numbers in the order torchvision has them, so that the bits are equal.
        red = x[:, 0] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = x[:, 1] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = x[:, 2] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.stack((red, green, blue), 1)


def _renormalize(network: Any) -> nn.Module:
    return _Renormalize() if network.transform_input else nn.Identity()


# What the forward methods of torchvision do between their modules.
_FUNCTIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "+avgpool": lambda network: nn.AdaptiveAvgPool2d(1),
    "+flatten": lambda network: nn.Flatten(1),
    "+relu": lambda network: nn.ReLU(),
    "+renormalize": _renormalize,
}

# The forward methods of torchvision, written as rows of blocks: (trunk, head).
# "features.*" stands for the children of `features`, "+name" for an entry above.
_PARTS: dict[type[nn.Module], tuple[str, str]] = {
    models.AlexNet: ("features.*", "avgpool +flatten classifier"),
    models.ConvNeXt: ("features.*", "avgpool classifier"),
    models.DenseNet: ("features.* +relu", "+avgpool +flatten classifier"),
    models.EfficientNet: ("features.*", "avgpool +flatten classifier"),
    models.GoogLeNet: (
        "+renormalize conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b "
        "maxpool3 inception4a inception4b inception4c inception4d inception4e "
        "maxpool4 inception5a inception5b",
        "avgpool +flatten dropout fc",
    ),
    models.Inception3: (
        "+renormalize Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 "
        "Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a "
        "Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c",
        "avgpool dropout +flatten fc",
    ),
    models.MaxVit: ("stem blocks.*", "classifier"),
    models.MNASNet: ("layers.*", "+avgpool +flatten classifier"),
    models.MobileNetV2: ("features.*", "+avgpool +flatten classifier"),
    models.MobileNetV3: ("features.*", "avgpool +flatten classifier"),
    models.RegNet: ("stem trunk_output.*", "avgpool +flatten fc"),
    models.ResNet: (
        "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4",
        "avgpool +flatten fc",
    ),
    models.ShuffleNetV2: (
        "conv1 maxpool stage2 stage3 stage4 conv5",
        "+avgpool +flatten fc",
    ),
    models.SqueezeNet: ("features.*", "classifier +flatten"),
    models.SwinTransformer: ("features.*", "norm permute avgpool flatten head"),
    models.VGG: ("features.*", "avgpool +flatten classifier"),
}


def reason_not_staged(network: nn.Module) -> str | None:
    """Say why a network cannot be cut into stages, or None if it can be.

    Parameters
    ----------
    network : Module
        Any network.

    Returns
    -------
    str or None
        A sentence for an error message, which names the class of the network.
    """
    kind = type(network).__name__
    if type(network) in _PARTS or _has_own_stages(network):
        return None
    if isinstance(network, models.VisionTransformer):
        return (
            f"a {kind} keeps one resolution from its first layer to its last, so "
            "there is nowhere a stage could end"
        )
    return (
        f"a {kind} is not a class of torchvision.models that can be cut, and it has "
        "no attributes `stages` (a ModuleDict, or modules in order) and `head` which "
        "say how to cut it"
    )


def split_into_stages(network: nn.Module, image_size: int) -> StagedModel:
    """Split a network into stages and a head.

    Parameters
    ----------
    network : Module
        In evaluation mode, on any device: its parameters are not read, nothing is
        computed. An instance of a class of ``torchvision.models`` (not of a subclass,
        whose forward may differ), or a network with attributes ``stages`` and
        ``head``, which are taken as they are.
    image_size : int
        Side in pixels at which the resolutions are measured.

    Returns
    -------
    StagedModel
        Made of the modules of `network` itself. Running it equals running `network`.

    Raises
    ------
    ValueError
        With `reason_not_staged`, where there is one.
    """
    reason = reason_not_staged(network)
    if reason is not None:
        raise ValueError(f"No stages: {reason}.")
    if type(network) not in _PARTS:
        return StagedModel(_own_stages(network), network.get_submodule("head"))
    stages = _grouped(_blocks(network, _PARTS[type(network)][0]), image_size)
    head = _head_blocks(network)
    if isinstance(network, models.SwinTransformer):
        # Its blocks are (n, h, w, c) inside; a stage is (n, c, h, w) at both ends.
        to_last, to_first = Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2])
        stages = [[to_last, *stage, to_first] for stage in stages]
        del stages[0][0]
        head = [to_last, *head]
    sequences = (nn.Sequential(*stage) for stage in stages)
    return StagedModel(_named(sequences), nn.Sequential(*head))


def check_staged_model(network: nn.Module, parts: StagedModel, image_size: int) -> None:
    """Check that stages and head are parts of the network and together are all of it.

    Parameters
    ----------
    network : Module
        In evaluation mode, on the CPU.
    parts : StagedModel
        Its stages and head.
    image_size : int
        Side in pixels of the noise that both are given.

    Raises
    ------
    ValueError
        If a parameter of theirs is not the network's, or the outputs differ by more
        than float32's rounding explains.
    """
    kind = type(network).__name__
    known = set(network.parameters())
    if any(not known.issuperset(part.parameters()) for part in parts.stages.values()):
        raise ValueError(
            f"The `stages` of a {kind} must be its own modules, or training them would "
            "not train it. Got parameters that are not in its `parameters()`. Make "
            "`stages` a ModuleDict or a ModuleList."
        )
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, image_size, image_size, generator=noise)
    with torch.inference_mode():
        expected, got = network(x.clone()), parts(x)
    if expected.shape != got.shape or not torch.allclose(
        expected, got, rtol=1e-4, atol=1e-5, equal_nan=True
    ):
        raise ValueError(
            f"The `stages` of a {kind}, run in order, and then its `head` must give "
            "what the network gives. They give something else. Move what `forward` "
            "does besides into a stage or into the head."
        )


def last_linear(network: nn.Module) -> str | None:
    """Name the last linear layer of a network: its input is the penultimate feature.

    Parameters
    ----------
    network : Module
        Any network. Where it can be cut, the layer is looked for in its head.

    Returns
    -------
    str or None
        The name in ``network.named_modules()`` of an ``nn.Linear``; of an
        ``nn.Conv2d`` if a head has only that (SqueezeNet, whose penultimate feature
        therefore is an ``(n, 512, h, w)`` map); None if there is none.
    """
    whole = reason_not_staged(network) is not None
    kinds = (nn.Linear,) if whole else (nn.Linear, nn.Conv2d)
    scope = [network] if whole else _head_blocks(network)
    within = {module for block in scope for module in block.modules()}
    for kind in kinds:
        names = [
            name
            for name, module in network.named_modules()
            if module in within and isinstance(module, kind)
        ]
        if names:
            return names[-1]
    return None


def _head_blocks(network: nn.Module) -> list[nn.Module]:
    if type(network) in _PARTS:
        return _blocks(network, _PARTS[type(network)][1])
    return [network.get_submodule("head")]


def _has_own_stages(network: nn.Module) -> bool:
    stages = getattr(network, "stages", None)
    return isinstance(getattr(network, "head", None), nn.Module) and isinstance(
        stages, nn.ModuleDict | nn.ModuleList | nn.Sequential | Mapping | list | tuple
    )


def _own_stages(network: nn.Module) -> dict[str, nn.Module]:
    stages: Any = network.stages
    if isinstance(stages, nn.ModuleDict | Mapping):
        named = dict(stages.items())
    else:
        named = _named(stages)
    for name, stage in named.items():
        if (
            not isinstance(stage, nn.Module)
            or not isinstance(name, str)
            or not name.isidentifier()
            or name in _RESERVED
        ):
            raise ValueError(
                "The `stages` of a network must be modules, with names such as "
                f"'stage1' that are none of {', '.join(sorted(_RESERVED))}. Got "
                f"{name!r}: a {type(stage).__name__}."
            )
    return named


def _named(stages: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {
        f"stage{depth}" if depth else "stem": stage
        for depth, stage in enumerate(stages)
    }


def _blocks(network: nn.Module, row: str) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for word in row.split():
        if word in _FUNCTIONS:
            blocks.append(_FUNCTIONS[word](network))
        elif word.endswith(".*"):
            blocks.extend(network.get_submodule(word[:-2]).children())
        else:
            blocks.append(network.get_submodule(word))
    return blocks


def _grouped(blocks: list[nn.Module], image_size: int) -> list[list[nn.Module]]:
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


def _halvings(blocks: list[nn.Module], image_size: int) -> list[int]:
    # On the meta device tensors have shapes but no content: this costs next to
    # nothing, and works whether or not the network has its weights yet.
    halvings = []
    x = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.no_grad():
        for block in blocks:
            # The last but one axis is a side in (n, c, h, w) and in (n, h, w, c).
            before = x.shape[-2]
            tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
            on_meta = {name: value.to("meta") for name, value in tensors.items()}
            x = torch.func.functional_call(block, on_meta, (x,))
            # Not exact: a pooling layer without padding takes 13 to 6.
            halvings.append(round(math.log2(before / x.shape[-2])))
    return halvings


def _has_parameters(blocks: list[nn.Module]) -> bool:
    return any(True for block in blocks for _ in block.parameters())
