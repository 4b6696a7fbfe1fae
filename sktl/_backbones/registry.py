"""Registry of backbones: resolve a name and weights to a `Backbone`.

The last used backbones are cached in the process, so that clones of an estimator share
one frozen network.
"""

import contextlib
import hashlib
import os
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any, Self

import torch
from torch import nn

from sktl._backbones import registered
from sktl._backbones.backbone import Backbone, LoadedNetwork
from sktl._backbones.catalog import find_source
from sktl._backbones.check_stages import check_staged_model
from sktl._backbones.registration import Registration, UnavailableBuilder
from sktl._backbones.saved_network import DEFAULT_BACKBONE, find_saved_network
from sktl._backbones.source import BackboneDefinition, is_path
from sktl._backbones.stages import find_head, last_linear
from sktl._backbones.timm_methods import is_timm_network
from sktl._backbones.timm_structure import CUT_VERSION
from sktl._backbones.unwrap import Head, fill_missing_head, select_state_dict
from sktl._backbones.weights import (
    changed_while_read,
    file_digest,
    load_weights,
    load_weights_into,
    skip_weight_allocation,
)
from sktl._utils.default_dtype import float32_default, float32_default_if_needed
from sktl._utils.keyed_cache import KeyedCache
from sktl._utils.random_state import preserve_rng_state
from sktl._utils.tensor_file import state_dict_digest

# Changes when other axes of a network are pooled, so that no old row is read.
_LAYOUT_VERSION = 1

# By name, registration or name of the weights, and digest of the file or seed. A search
# over strategies uses two or three backbones at the same time.
backbones: KeyedCache[tuple[str, Registration | str, str], Backbone]
backbones = KeyedCache(max_size=4)


def load_backbone(
    name: str,
    weights: str | PathLike[str] | None = "DEFAULT",
    *,
    random_state: int = 0,
    progress: bool = False,
) -> Backbone:
    """Return a backbone, from the cache if it was loaded before.

    A weights file is downloaded and its digest computed here, but for all networks
    except registered ones its tensors are read only when ``backbone.network`` is first
    accessed. Threads wait only for the same backbone.

    Parameters
    ----------
    name : str
        One of `list_backbones`; the name of one of timm may end in ``@`` and a
        revision of the repository of its weights. Of a file of a fine-tuned estimator,
        the default of the estimators or the name in the file.

    weights : str, path-like or None, default="DEFAULT"
        Name of weights of torchvision, or ``"DEFAULT"`` for those of timm, downloaded
        if they are not on this machine; the path of a state dict, with the suffix
        ``.pth``, ``.pt``, ``.safetensors``, ``.pth.tar``, ``.ckpt`` or ``.bin``; None
        for random weights. A file with the name that torchvision gives it has the
        preprocessing and categories of these weights, any other file those of the
        default weights; categories only if their number is that of the outputs. The
        head may be missing in the file. A file that a fine-tuned estimator has saved
        has its own network, preprocessing and labels.

    random_state : int, default=0
        Seed of random weights. The global random state is not changed.

    progress : bool, default=False
        Whether to show a progress bar of a download, and to print once what was
        removed from a weights file, such as a prefix of its names.

    Returns
    -------
    Backbone
        Shared by all callers with the same arguments; do not modify it.

    Raises
    ------
    ConnectionError
        If weights cannot be downloaded.
    FileNotFoundError
        If there is no file at that path.
    ImportError
        If the network is one of timm, which is not installed.
    TypeError
        If `weights` has another type, or a registered builder returns no network.
    ValueError
        If a name is unknown, or the digest of the file is not the one in its name. For
        a registered backbone also if its file is invalid.
    """
    backbone = _get_backbone(name, weights, random_state, progress)
    if progress:
        backbone.print_removed()
    return backbone


def declare_without_weights(
    name: str, weights: str | PathLike[str] | None, *, on_meta: bool
) -> Backbone:
    """Return a backbone whose weights are neither downloaded nor read.

    Parameters
    ----------
    name, weights
        As in `load_backbone`. Of a file that a fine-tuned estimator has saved, only the
        description of its network is used.
    on_meta : bool
        Whether parameters and buffers are on the meta device: they have shapes, but no
        values and no memory. Otherwise they are random.

    Returns
    -------
    Backbone
        Not shared, and without a digest.

    Raises
    ------
    TypeError, ValueError
        As `load_backbone`.
    """
    name, definition = _resolve(name, weights, progress=False, fetch=False)
    network = _build_network(definition, None, 0, has_weights=on_meta)
    network = network.to("meta" if on_meta else "cpu", torch.float32)
    loaded = LoadedNetwork(network.eval().requires_grad_(False), digest="")
    return Backbone(name, "", definition, lambda: loaded)


def _get_backbone(
    name: str, weights: str | PathLike[str] | None, random_state: int, progress: bool
) -> Backbone:
    name, definition = _resolve(name, weights, progress)
    if definition.file is None:
        identity = f"seed {random_state}"
    else:
        identity = definition.file_digest or file_digest(definition.file)
    key = (name, definition.registration or definition.weights_name, identity)
    if definition.file is None or definition.is_registered:
        backbone = backbones.get(key)
        if backbone is not None:
            return backbone
        # A builder may load another backbone, under the lock of the global random
        # number generators. To prevent a deadlock, that lock is always acquired first.
        with preserve_rng_state():
            create = partial(_build_backbone, name, definition, random_state, identity)
            return backbones.get_or_create(key, create)

    # The file is read later, maybe in another working directory.
    file = os.path.join(os.getcwd(), os.path.expanduser(definition.file))
    create = partial(_declare_backbone, name, definition, file, identity)
    backbone = backbones.get_or_create(key, create)
    if not backbone.is_loaded and backbone.definition.file != file:
        # Equal content in another file, which may exist longer.
        backbones.drop(lambda each: each == key)
        backbone = backbones.get_or_create(key, create)
    return backbone


@dataclass(frozen=True)
class BackboneSpec:
    """Arguments of `load_backbone` and the digest, to load a backbone in any process.

    Attributes
    ----------
    name, weights, random_state
        As in `load_backbone`.
    digest : str
        Digest of the backbone.
    registration : Registration or None
        That with which the backbone was loaded, if it is a registered one.
    """

    name: str
    weights: str | None
    random_state: int
    digest: str
    # The digest depends on it.
    registration: Registration | None = field(default=None, compare=False, repr=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state, and register the backbone if this process does not know it."""
        vars(self).update(state)
        if self.registration is None:
            return
        # `load` compares digests, so this process may have another registration now.
        known = registered.restore(self.registration, required=False)
        if isinstance(self.registration.builder, UnavailableBuilder):
            vars(self)["registration"] = known

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the specification itself, which cannot be modified."""
        # Copying the state would register the backbone again.
        return self

    @classmethod
    def to(
        cls,
        backbone: Backbone,
        weights: str | PathLike[str] | None,
        random_state: int = 0,
    ) -> Self:
        """Return the specification of a backbone.

        Parameters
        ----------
        backbone : Backbone
            From `load_backbone`.
        weights, random_state
            Arguments with which it was loaded.

        Returns
        -------
        BackboneSpec
            Valid in any working directory.
        """
        if isinstance(weights, PathLike) or (weights is not None and is_path(weights)):
            weights = os.path.join(os.getcwd(), os.path.expanduser(weights))
        registration = backbone.definition.registration
        return cls(backbone.name, weights, random_state, backbone.digest, registration)

    def load(self) -> Backbone:
        """Load the backbone, or return it from the cache of this process.

        Returns
        -------
        Backbone
            With the digest of this specification.

        Raises
        ------
        FileNotFoundError, ConnectionError
            If the weights are missing on this machine.
        ValueError
            If this machine has other weights, or for the reasons of `load_backbone`.
        """
        weights = f"The weights {self.weights!r} of {self.name!r}"
        machine = f"the machine {socket.gethostname()!r}, where they are used"
        try:
            backbone = load_backbone(
                self.name, self.weights, random_state=self.random_state
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise type(error)(
                f"{weights} must be on {machine}. They are missing: {error}"
            ) from error
        if backbone.digest != self.digest:
            raise ValueError(
                f"{weights} must have the digest {self.digest[:12]} on {machine}. Got "
                f"{backbone.digest[:12]}. Copy the file to that machine, or put it on "
                "a file system that all machines share."
            )
        return backbone


def _resolve(
    name: str,
    weights: str | PathLike[str] | None,
    progress: bool,
    *,
    fetch: bool = True,
) -> tuple[str, BackboneDefinition]:
    """Return the name of a backbone and its definition.

    The name is that in a saved file, if `weights` is one; both are of one reading.
    """
    saved = find_saved_network(weights)
    if saved is None or weights is None:
        return name, find_source(name).resolve(name, weights, progress, fetch=fetch)
    own = saved.architecture.backbone
    if name not in (own, DEFAULT_BACKBONE):
        raise ValueError(
            f"The weights {str(weights)!r} were fine-tuned from the backbone {own!r}, "
            f"so the 'backbone' parameter must be {own!r} or its default. Got "
            f"{name!r}. Remove the parameter, or choose other weights."
        )
    try:
        definition = find_source(own).resolve(own, None, progress)
    except ValueError as error:
        raise ValueError(
            f"The backbone of the fine-tuned network in {str(weights)!r} must be "
            f"known. Got: {error}"
        ) from error
    return own, saved.definition(definition, weights)


def _declare_backbone(
    name: str, definition: BackboneDefinition, file: str, digest: str
) -> Backbone:
    """Return a backbone that reads its weights file when its network is accessed."""

    def load() -> LoadedNetwork:
        loaded = _load_network(name, definition, file, 0)
        if loaded.digest != digest:
            raise changed_while_read(file)
        return loaded

    return Backbone(name, digest, replace(definition, file=file), load)


def _build_backbone(
    name: str, definition: BackboneDefinition, seed: int, identity: str
) -> Backbone:
    """Return a backbone whose digest depends on the network that is built."""
    loaded = _load_network(name, definition, definition.file, seed)
    network, digest = loaded.network, loaded.digest
    if definition.file is not None and digest != identity:
        raise changed_while_read(definition.file)
    backbone = Backbone(name, digest, definition, lambda: loaded)
    if definition.is_registered:
        if backbone.staged_model is not None:
            with float32_default_if_needed():
                check_staged_model(
                    backbone.network,
                    backbone.staged_model,
                    definition.preprocessing.crop_size,
                    definition.preprocessing.n_channels,
                )
        if not loaded.missing_head and backbone.categories != definition.categories:
            raise ValueError(
                f"categories must name each output of the backbone {name!r}, which has "
                f"{backbone.n_outputs} outputs. Got "
                f"{len(definition.categories or ())} names. Pass one name for each "
                "output, or categories=None."
            )
        # The parameters do not depend on strides, and a name that is registered again
        # may have another preprocessing.
        content = f"{network} {definition.preprocessing} {digest}"
        registration = definition.registration
        declared = registration is not None and registration.stages is not None
        if is_timm_network(network) and not declared:
            # Their penultimate features and tokens were once those of other networks.
            content += f" {definition.layout} {_LAYOUT_VERSION} timm {CUT_VERSION}"
        elif backbone.structure.is_channels_last("") is None:
            content += f" {definition.layout} {_LAYOUT_VERSION}"
        elif backbone.structure.n_prefix_tokens("encoder"):
            # The class token of torchvision's vision transformers was once averaged
            # with the patches.
            content += " patches"
        if registration is not None and registration.stages:
            content += f" {registration.stages} {registration.head} {_LAYOUT_VERSION}"
        if registration is not None and registration.n_prefix_tokens:
            content += f" {registration.n_prefix_tokens} tokens"
        backbone.digest = hashlib.sha256(content.encode()).hexdigest()
    return backbone


def _load_network(
    name: str, definition: BackboneDefinition, file: str | None, seed: int
) -> LoadedNetwork:
    """Return the frozen network and the digest of its weights."""
    if file is None:
        network = _freeze(_build_network(definition, None, seed))
        return LoadedNetwork(network, state_dict_digest(network.state_dict()))
    weights = load_weights(file)
    # That of the file after the tensors were read, unless it was known before.
    if weights.digest != (definition.file_digest or file_digest(file)):
        raise changed_while_read(file)
    network = _build_network(definition, None, seed, has_weights=True)
    # Once, since networks of timm are recorded; in the mode that this requires.
    structure = definition.describe(network.eval())
    # The head of a fine-tuned network is not optional in its file.
    head = Head() if definition.heads else find_head(network, structure)
    origin = f"The weights {file!r} for the backbone {name!r}"
    selection = select_state_dict(
        weights.state_dicts, network, head, definition.adapt_state_dict, origin
    )
    n_outputs = None  # the default
    last = last_linear(network, structure)
    weight = None if last is None else selection.state_dict.get(f"{last}.weight")
    if not definition.is_registered and weight is not None and weight.ndim > 0:
        if len(weight) != len(network.get_parameter(f"{last}.weight")):
            n_outputs = len(weight)  # fine-tuned on another number of categories
            network = _build_network(definition, n_outputs, seed, has_weights=True)
    fill_missing_head(selection.state_dict, network, selection.missing_head)
    load_weights_into(network, selection.state_dict, origin)
    if any(value.is_meta for value in [*network.parameters(), *network.buffers()]):
        # A constant that is not saved, and that was computed into an empty tensor.
        network = _build_network(definition, n_outputs, seed)
        load_weights_into(network, selection.state_dict, origin)
    removed = f"{origin}: {selection.removed}." if selection.removed else ""
    return LoadedNetwork(
        _freeze(network), weights.digest, selection.missing_head, removed
    )


def _build_network(
    definition: BackboneDefinition,
    num_classes: int | None,
    seed: int,
    *,
    has_weights: bool = False,
) -> nn.Module:
    # The stages of a saved network are compared with its original, which needs values.
    if has_weights and not (definition.is_registered or definition.heads):
        # Without values nothing is drawn, so no lock of the generators is needed.
        with contextlib.suppress(RuntimeError):  # a constant depends on the values
            with float32_default(), skip_weight_allocation():
                return definition.build(num_classes)
    with preserve_rng_state(), float32_default():
        torch.default_generator.manual_seed(seed)
        return definition.build(num_classes)


def _freeze(network: nn.Module) -> nn.Module:
    return network.to("cpu", torch.float32).eval().requires_grad_(False)
