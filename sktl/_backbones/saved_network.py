"""Networks that a fine-tuned estimator has saved, as backbones.

A saved file names the backbone that was fine-tuned and describes the heads that
replaced its own, so that the network can be built without the original weights. The
network has the stages of the backbone, with the fine-tuned weights.

Its tensors have the names that they have in the backbone, such as
``backbone.layer1.0.conv1.weight``, and ``heads.0.1.weight`` in the first of the heads.
Names of a fine-tuned network would also depend on how the backbone is divided into
blocks, which for a network of timm may change with its code and with ours.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, cast

from torch import Tensor, nn

from sktl._backbones.backbone import Backbone, LoadedNetwork
from sktl._backbones.new_head import HEAD, NECK, parts_below_head, replace_head
from sktl._backbones.source import (
    BackboneDefinition,
    HeadConfig,
    Label,
    NetworkStructure,
    is_path,
)
from sktl._backbones.unwrap import StateDict
from sktl._backbones.weights import (
    changed_while_read,
    file_digest,
    skip_weight_allocation,
)
from sktl._images.preprocessing import Preprocessing
from sktl._utils.json_values import get_value, is_list_of, require
from sktl._utils.keyed_cache import KeyedCache
from sktl._utils.labels import labels_from_json
from sktl._utils.tensor_file import read_document

FORMAT = "sktl fine-tuned model, version 5"
#: Default of the parameter `backbone`, which cannot be told from a value of the user.
DEFAULT_BACKBONE = "resnet18"

_WITHOUT_LABELS = ("multilabel", "regression")  # kinds of target, besides multiclass
_MAX_WIDTH = 2**20  # of a hidden layer, or of the outputs
_MAX_NORMALIZATION = 1e6  # of mean and std, for pixels in [0, 1]


@dataclass(frozen=True)
class Architecture:
    """What is needed to build a fine-tuned network, apart from its number of outputs.

    Attributes
    ----------
    backbone : str
        Name of the backbone that was fine-tuned.
    heads : tuple of HeadConfig
        Heads that replaced its own, in the order of the fine-tunings. The last layer
        of each is replaced by the next one.
    """

    backbone: str
    heads: tuple[HeadConfig, ...]

    def build(self, backbone: Backbone, n_outputs: int) -> Backbone:
        """Return the fine-tuned network, with uninitialized or random weights.

        Parameters
        ----------
        backbone : Backbone
            With the name of `backbone`.
        n_outputs : int
            Number of outputs of the last head.

        Returns
        -------
        Backbone
            Its network is one from `replace_head`, and its structure has
            `saved_names`. The parameters of the heads have no memory, since the widths
            in a file may be invalid.
        """
        _ = backbone.structure  # it may be found by running the network
        with skip_weight_allocation():
            for head in self.heads:
                backbone = _with_new_head(backbone, head, n_outputs)
        return backbone


@dataclass(frozen=True)
class SavedNetwork:
    """Description of the network in a saved file.

    Attributes
    ----------
    architecture : Architecture
        How to build it.
    preprocessing : Preprocessing
        Preprocessing of its images.
    labels : tuple of str, int, float or bool, or None
        Class labels, in the order of the outputs. None if an output is no class.
    n_outputs : int
        Number of outputs.
    digest : str
        sha256 of the file.
    """

    architecture: Architecture
    preprocessing: Preprocessing
    labels: tuple[Label, ...] | None
    n_outputs: int
    digest: str

    def definition(
        self, backbone: BackboneDefinition, file: str | PathLike[str]
    ) -> BackboneDefinition:
        """Return the definition of a backbone with this network.

        Parameters
        ----------
        backbone : BackboneDefinition
            Of the backbone that was fine-tuned, with random weights.
        file : str or path-like
            The saved file.

        Returns
        -------
        BackboneDefinition
            The categories are the class labels, if there are any.
        """
        builder = _Builder(self, backbone)
        return replace(
            backbone,
            build=builder.build,
            describe=builder.describe,
            preprocessing=self.preprocessing,
            categories=self.labels,
            file=os.fspath(file),
            file_digest=self.digest,
            adapt_state_dict=builder.adapt_state_dict,
            known_weights=(),
            license=None,
            embedding_width=None,
            heads=self.architecture.heads,
        )


class _Builder:
    """Builds the network of a saved file, and describes what it has built.

    Parameters
    ----------
    saved : SavedNetwork
        Description of the network.
    backbone : BackboneDefinition
        Of the backbone that was fine-tuned.
    """

    def __init__(self, saved: SavedNetwork, backbone: BackboneDefinition) -> None:
        self._saved, self._backbone = saved, backbone

    def build(self, num_classes: int | None) -> nn.Module:
        """Return a new network."""
        # Never a copy of an earlier one: that one may have no values where this one
        # must have them, such as constants that no file contains.
        loaded = LoadedNetwork(self._backbone.build(None).eval(), "")
        name = self._saved.architecture.backbone
        backbone = Backbone(name, "", self._backbone, lambda: loaded)
        built = self._saved.architecture.build(backbone, self._saved.n_outputs)
        loaded.network.to("meta")  # needed for the description only
        self._describe = built.definition.describe
        return built.network

    def describe(self, network: nn.Module) -> NetworkStructure:
        """Describe a network from `build`, or a copy of one."""
        return self._describe(network)

    def adapt_state_dict(self, network: nn.Module, state_dict: StateDict) -> StateDict:
        """Return the tensors of the file with their names in a network."""
        return from_saved_names(state_dict, self.describe(network))


def saved_names(backbone: Backbone, network: nn.Sequential) -> dict[str, str]:
    """Return the name in a saved file of each tensor of a network.

    Parameters
    ----------
    backbone : Backbone
        Backbone that was fine-tuned.
    network : nn.Sequential
        Network that `replace_head` has made from it.

    Returns
    -------
    dict of str to str
        By the names in the state dict of `network`. A parameter with several names has
        one in the file.
    """
    before = backbone.structure.saved_names
    own: dict[int, str] = {}
    for name, tensor in backbone.network.state_dict(keep_vars=True).items():
        saved = f"backbone.{name}" if before is None else before[name]
        own.setdefault(id(tensor), saved)
    # The tensors of these parts are those of the backbone.
    below = parts_below_head(backbone).state_dict(keep_vars=True)
    names = {name: own[id(below[name])] for name in below}
    head = f"heads.{len(backbone.definition.heads)}"
    for name in network.get_submodule(HEAD).state_dict():
        names[f"{HEAD}.{name}"] = f"{head}.{name}"
    return names


def from_saved_names(
    tensors: Mapping[str, Tensor], structure: NetworkStructure
) -> StateDict:
    """Return the tensors of a saved file with their names in the network.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Tensors by their names in the file.
    structure : NetworkStructure
        Of the network, with `saved_names`.

    Returns
    -------
    dict of str to Tensor
        Unknown tensors keep their names, for the error message of `load_weights_into`.
    """
    names = structure.saved_names or {}
    known = {name: tensors[saved] for name, saved in names.items() if saved in tensors}
    unknown = tensors.keys() - set(names.values())
    return {**{name: tensors[name] for name in sorted(unknown)}, **known}


# By digest of the file.
_saved: KeyedCache[str, SavedNetwork | None] = KeyedCache(max_size=32)


def find_saved_network(weights: object) -> SavedNetwork | None:
    """Return the description of the network in a saved file.

    Parameters
    ----------
    weights : object
        Value of the parameter `weights`.

    Returns
    -------
    SavedNetwork or None
        None if it is not the path of a saved file.

    Raises
    ------
    ValueError
        If the file is damaged, was saved by another version, or changed while it was
        read.
    """
    if not isinstance(weights, PathLike) and not (
        isinstance(weights, str) and is_path(weights)
    ):
        return None
    path = os.path.expanduser(weights)
    if not os.path.isfile(path):
        return None
    digest = file_digest(path)
    return _saved.get_or_create(digest, lambda: _read(path, digest))


def parse_architecture(document: Mapping[str, Any]) -> Architecture:
    """Return the architecture in the document of a saved file.

    Parameters
    ----------
    document : mapping of str
        From a file; anything that JSON can hold may be in it.

    Returns
    -------
    Architecture

    Raises
    ------
    ValueError
        If a value is missing or invalid.
    """
    described = get_value(document, "architecture", dict)
    heads = get_value(described, "heads", list)
    require(
        len(heads) > 0 and all(isinstance(head, dict) for head in heads),
        "its heads must be a list of descriptions",
    )
    return Architecture(
        get_value(described, "backbone", str), tuple(map(_parse_head, heads))
    )


def parse_preprocessing(document: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of a saved file, as `parse_architecture` does."""
    described = get_value(document, "preprocessing", dict)
    mean, std = get_value(described, "mean", list), get_value(described, "std", list)
    require(
        is_list_of(mean + std, int, float)
        and all(abs(value) < _MAX_NORMALIZATION for value in mean + std),
        "its mean and std must be lists of small numbers",
    )
    return Preprocessing(
        get_value(described, "resize_size", int),
        get_value(described, "crop_size", int),
        get_value(described, "interpolation", str),
        tuple(mean),
        tuple(std),
        get_value(described, "resize", str),
    )


def _read(path: str, digest: str) -> SavedNetwork | None:
    document = read_document(path)
    if file_digest(path) != digest:  # else the document would be that of another file
        raise changed_while_read(path)
    if document is None:
        return None
    if document.get("format") != FORMAT:
        raise ValueError(
            "Weights must be a state dict or a file that a fine-tuned estimator of "
            f"this version of sktl has saved. Got {path!r} of the format "
            f"{document.get('format')!r}. Fit and save it again with this version."
        )
    try:
        target = get_value(document, "target", dict)
        labels, n_outputs = _parse_target(target)
        return SavedNetwork(
            parse_architecture(document),
            parse_preprocessing(document),
            labels,
            n_outputs,
            digest,
        )
    except ValueError as error:
        raise ValueError(
            f"{path!r} must be an unchanged file of a fine-tuned estimator. Got: "
            f"{error}"
        ) from error


def _parse_target(target: Mapping[str, Any]) -> tuple[tuple[Label, ...] | None, int]:
    """Return the class labels, if there are any, and the number of outputs."""
    kind = target.get("kind")
    if kind == "multiclass":
        labels = tuple(labels_from_json(target).tolist())
        return labels, len(labels)
    require(kind in _WITHOUT_LABELS, f"its kind of target {kind!r} is unknown")
    n_outputs = get_value(target, "n_outputs", int)
    require(0 < n_outputs <= _MAX_WIDTH, "its number of outputs is invalid")
    return None, n_outputs


def _parse_head(document: Mapping[str, Any]) -> HeadConfig:
    widths = get_value(document, "hidden_layer_sizes", list)
    require(
        all(type(width) is int and 0 < width <= _MAX_WIDTH for width in widths),
        f"its hidden_layer_sizes must be ints from 1 to {_MAX_WIDTH}",
    )
    dropout = get_value(document, "dropout", (int, float))
    require(0 <= dropout < 1, "its dropout must be in [0, 1)")
    return HeadConfig(tuple(widths), float(dropout))


def _with_new_head(backbone: Backbone, head: HeadConfig, n_outputs: int) -> Backbone:
    """Return a backbone with the network that `replace_head` returns."""
    network = replace_head(
        backbone,
        n_outputs,
        hidden_layer_sizes=head.hidden_layer_sizes,
        dropout=head.dropout,
    )
    definition = backbone.definition
    describe = functools.partial(
        _describe_network, backbone, saved_names(backbone, network)
    )
    return Backbone(
        backbone.name,
        backbone.digest,
        replace(definition, describe=describe, heads=(*definition.heads, head)),
        lambda: LoadedNetwork(network, backbone.digest),
    )


def _describe_network(
    backbone: Backbone, saved: Mapping[str, str], network: nn.Module
) -> NetworkStructure:
    """Describe a network that `replace_head` has made from a backbone."""
    parts = dict(network.named_children())
    neck, head = parts.pop(NECK), parts.pop(HEAD)
    structure = backbone.structure
    is_staged = structure.reason_not_staged is None
    # The modules of the backbone, by their names in the network: first those that it
    # knows by a name of its own, then blocks that are made of its modules.
    below = dict(parts_below_head(backbone).named_modules(remove_duplicate=False))
    own = {module: name for name, module in backbone.network.named_modules()}
    own_names = {layer: own[module] for layer, module in below.items() if module in own}
    own_names |= {stage: stage for stage in parts if is_staged}
    tokens = dict(zip(structure.trunk, structure.trunk_prefix_tokens, strict=False))
    n_tokens = {n: tokens[module] for n, module in below.items() if module in tokens}

    def is_channels_last(layer: str) -> bool | None:
        known = layer in own_names
        return structure.is_channels_last(own_names[layer]) if known else None

    def n_prefix_tokens(layer: str) -> int:
        if layer in own_names:
            return structure.n_prefix_tokens(own_names[layer])
        return n_tokens.get(layer, 0)

    # From the images, if there are no stages.
    neck_blocks = [neck] if is_staged else [*parts.values(), neck]
    return replace(
        structure,
        trunk=(),
        stages=parts if is_staged else None,
        head=[nn.Sequential(neck, head)],
        neck=None
        if structure.neck is None
        else [*neck_blocks, *list(head.children())[:-1]],
        trunk_channels_last=(),
        trunk_prefix_tokens=(),
        trunk_sides=None,
        is_channels_last=is_channels_last,
        n_prefix_tokens=n_prefix_tokens,
        no_weight_decay=frozenset(cast(Any, network).no_weight_decay),
        saved_names=saved,
    )
