"""Backbones of torchvision: the classification networks of ``torchvision.models``.

All that depends on classes of ``torchvision.models`` is in this module.
"""

import functools
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from sktl._backbones.source import (
    BackboneDefinition,
    NetworkStructure,
    weights_path,
)
from sktl._backbones.stages import describe_network as describe_own_stages
from sktl._backbones.timm_methods import no_weight_decay
from sktl._backbones.unwrap import StateDict
from sktl._backbones.vision_transformer import (
    Embedding,
    VisionTransformer,
    adapt_positions,
    patch_size,
    support_other_sizes,
)
from sktl._backbones.weights import fetch_weights
from sktl._images.preprocessing import Preprocessing

_MAX_DEFINITIONS = 32

# Heads that are used in training only and that the networks here do not have.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# Names in files of DenseNet from before torch disallowed a dot in the name of a module.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


class _Renormalize(nn.Module):
    """Map ImageNet's mean and deviation to 0.5, as GoogLeNet and Inception do."""

    def forward(self, x: Tensor) -> Tensor:
        # Same operations in the same order as in torchvision, for equal bits.
        red = x[:, 0] * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = x[:, 1] * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = x[:, 2] * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.stack((red, green, blue), 1)


class _ClassToken(nn.Module):
    """Select the first token: (n, tokens, c) -> (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def _renormalize(network: Any) -> nn.Module:
    return _Renormalize() if network.transform_input else nn.Identity()


# Operations in the forward methods of torchvision that are not modules.
_FUNCTIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "+class_token": lambda network: _ClassToken(),
    "+embedding": Embedding,
    "+avgpool": lambda network: nn.AdaptiveAvgPool2d(1),
    "+flatten": lambda network: nn.Flatten(1),
    "+relu": lambda network: nn.ReLU(),
    "+renormalize": _renormalize,
}

# The forward methods of torchvision as sequences of blocks: (trunk, head).
# "features.*" are the children of `features`, "+name" is an entry of _FUNCTIONS.
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
    models.VisionTransformer: (
        "+embedding encoder.dropout encoder.layers.* encoder.ln",
        "+class_token heads",
    ),
}
# As in the training script of torchvision.
_NO_WEIGHT_DECAY = frozenset(
    {"class_token", "encoder.pos_embedding", "*.relative_position_bias_table"}
)
_PARTS[VisionTransformer] = _PARTS[models.VisionTransformer]


def owns(name: str) -> bool:
    """Return whether a name is that of a network of torchvision."""
    return name in names()


@functools.cache  # called in each fit and transform
def names(pretrained: bool = False) -> Collection[str]:
    """Return the names of the classification networks of torchvision."""
    return frozenset(models.list_models(module=models))


def resolve(
    name: str,
    weights: str | PathLike[str] | None,
    progress: bool,
    *,
    fetch: bool = True,
) -> BackboneDefinition:
    """Return the definition of a network of torchvision; see `BackboneSource`."""
    enum = _weights_enum(name)
    member, file, license_ = enum.DEFAULT, None, None
    short = str(weights).removeprefix(f"{enum.__name__}.")
    if short in enum.__members__:
        member = enum[short]
        license_ = member.meta.get("license")
        if fetch:
            file = str(fetch_weights(member.url, progress=progress))
    elif weights is not None:
        file = weights_path(name, weights, enum.__members__)
        # A file with the name that torchvision gives it has the weights of that name.
        known = _weights_by_file(name).get(os.path.basename(file))
        if known is not None:
            member, license_ = known, known.meta.get("license")
    return _definition(name, member, file, license_, weights is None)


def describe_network(network: nn.Module) -> NetworkStructure:
    """Describe a network of any class.

    Parameters
    ----------
    network : Module
        An instance of a class of ``torchvision.models``, or any other network: it has
        stages if it defines them by its attributes.

    Returns
    -------
    NetworkStructure
        Of a subclass, whose forward method may differ, the blocks are not known.
    """
    structure = describe_own_stages(network)
    if type(network) in _PARTS:
        trunk, head = (_blocks(network, row) for row in _PARTS[type(network)])
        structure = NetworkStructure(trunk=trunk, head=head)
    is_transformer = isinstance(network, models.VisionTransformer)
    side_multiple = patch_size(network)
    return replace(
        structure,
        trunk_channels_last=(type(network) is models.SwinTransformer,)
        * len(structure.trunk),
        trunk_prefix_tokens=(int(is_transformer),) * len(structure.trunk),
        has_fixed_image_size=isinstance(network, models.MaxVit)
        or (is_transformer and side_multiple is None),
        side_multiple=side_multiple or 1,
        is_channels_last=functools.partial(_is_channels_last, network),
        n_prefix_tokens=functools.partial(_n_prefix_tokens, network),
        no_weight_decay=no_weight_decay(network) or _NO_WEIGHT_DECAY,
    )


def adapt_state_dict(network: nn.Module, state_dict: StateDict) -> StateDict:
    """Convert the state dicts that differ from those of today's networks.

    Tensors of old DenseNet files are renamed, and unused auxiliary heads omitted. Of
    vision transformers, the positional embeddings may be those of another image size.

    Parameters
    ----------
    network : Module
        Network that the state dict is for.
    state_dict : dict of str to Tensor
        Not modified.

    Returns
    -------
    dict of str to Tensor
        With the names of the parameters of `network`.
    """
    own = network.state_dict()
    adapted: Any = OrderedDict()
    for name, tensor in state_dict.items():
        name = _OLD_DENSENET.sub(r"\1\2", name)
        if name in own or not name.startswith(_AUXILIARY):
            adapted[name] = tensor
    if hasattr(state_dict, "_metadata"):
        adapted._metadata = state_dict._metadata
    adapt_positions(network, adapted)
    return adapted


@functools.cache
def _weights_enum(name: str) -> Any:
    return models.get_model_weights(name)


@functools.cache
def _weights_by_file(name: str) -> dict[str, Any]:
    return {os.path.basename(each.url): each for each in _weights_enum(name)}


@functools.lru_cache(_MAX_DEFINITIONS)
def _definition(
    name: str, member: Any, file: str | None, license_: str | None, is_random: bool
) -> BackboneDefinition:
    options: dict[str, Any] = {}
    is_transformer = name.startswith("vit_")
    if name in ("googlenet", "inception_v3"):
        # The options of the networks with weights, after loading.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif is_transformer:
        options = {"image_size": member.meta["min_size"][0]}

    def build(num_classes: int | None) -> nn.Module:
        count = {} if num_classes is None else {"num_classes": num_classes}
        network = models.get_model(name, weights=None, **options, **count)
        return support_other_sizes(network)

    categories = None if is_random else member.meta["categories"]
    return BackboneDefinition(
        build,
        describe_network,
        Preprocessing.from_torchvision(member.transforms()),
        None if categories is None else tuple(categories),
        min_size=1 if is_transformer else max(member.meta["min_size"]),
        # Of a vision transformer, the network has the size of a patch.
        has_fixed_image_size=None if is_transformer else name.startswith("maxvit"),
        weights_name=member.name,
        file=file,
        adapt_state_dict=adapt_state_dict,
        known_weights=tuple(type(member).__members__),
        license=license_,
    )


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


def _n_prefix_tokens(network: nn.Module, layer: str) -> int:
    # The class token is added between the patch embedding and the encoder.
    is_transformer = isinstance(network, models.VisionTransformer)
    is_above = re.match(r"(encoder|stem|stage\d+)\b", layer) is not None
    return int(is_transformer and is_above)


def _is_channels_last(network: nn.Module, layer: str) -> bool | None:
    if isinstance(network, models.MaxVit) and "_attention." in layer:
        raise ValueError(
            f"The axes of {layer!r} are images, windows, positions and channels, "
            "which cannot be pooled. Choose the whole attention layer, or a stage."
        )
    if isinstance(network, models.SwinTransformer):
        inside = layer.split(".")[0] in {"features", "norm"}
        return inside and not isinstance(network.get_submodule(layer), nn.Conv2d)
    if isinstance(network, models.ConvNeXt):
        # Between the two permutations of a block: norm, linear, activation, linear.
        return re.search(r"\.block\.[1-5]$", layer) is not None
    is_known = type(network) in _PARTS or isinstance(network, models.VisionTransformer)
    return False if is_known else None
