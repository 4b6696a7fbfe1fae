"""Backbones that `register_backbone` adds, in this process."""

import copy
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from multiprocessing import parent_process
from os import PathLike
from typing import Any

from torch import nn

from sktl._backbones import timm_structure, torchvision
from sktl._backbones.named_modules import describe_named_parts
from sktl._backbones.registration import Registration, UnavailableBuilder
from sktl._backbones.source import (
    BackboneDefinition,
    NetworkStructure,
    weights_path,
)
from sktl._backbones.timm_methods import is_timm_network
from sktl._backbones.vision_transformer import support_other_sizes
from sktl._backbones.without_classifier import find_neck

registrations: dict[str, Registration] = {}


def owns(name: str) -> bool:
    """Return whether a name was registered."""
    return name in names()


def names(pretrained: bool = False) -> Collection[str]:
    """Return the names of the registered backbones."""
    return tuple(registrations)  # a copy, since other threads may register


def resolve(
    name: str,
    weights: str | PathLike[str] | None,
    progress: bool,
    *,
    fetch: bool = True,
) -> BackboneDefinition:
    """Return the definition of a registered backbone; see `BackboneSource`."""
    file = None
    if weights is not None and weights != "DEFAULT":
        file = weights_path(name, weights, ["DEFAULT"])
    registration = registrations[name]
    return BackboneDefinition(
        partial(_build, registration),
        partial(_describe, registration),
        registration.preprocessing,
        registration.categories,
        has_fixed_image_size=None,
        file=file,
        registration=registration,
        adapt_state_dict=torchvision.adapt_state_dict,
        layout=registration.layout,
        known_weights=("DEFAULT",),
    )


def add(registration: Registration) -> None:
    """Add a backbone, or replace the one with that name."""
    registrations[registration.name] = registration


def registrations_to_pickle(name: object, *, with_others: bool) -> list[Registration]:
    """Return what the pickle of an object with a backbone must contain.

    Parameters
    ----------
    name : object
        Name of its backbone.
    with_others : bool
        Whether to add all backbones that any process can import.

    Returns
    -------
    list of Registration
        First that of the backbone, if it is a registered one.
    """
    each = list(registrations.values())
    own = [registration for registration in each if registration.name == name]
    others = [r for r in each if with_others and r.is_importable and r.name != name]
    return own + others


def restore(
    registration: Registration, *, required: bool = True, any_builder: bool = False
) -> Registration:
    """Register a backbone that comes from a pickle or from a saved file.

    In a worker process, which outlives a registration, it replaces one that was
    restored before. It does not replace one that the user of this process registered.

    Parameters
    ----------
    registration : Registration
        Of another process, or of this one.
    required : bool, default=True
        Whether an object that is loaded has this backbone.
    any_builder : bool, default=False
        Whether the registration of this process may have another builder.

    Returns
    -------
    Registration
        That of this process now, if it has one.

    Raises
    ------
    ValueError
        If it is required, and this process has another backbone under the name.
    """
    known = registrations.get(registration.name)
    if isinstance(registration.builder, UnavailableBuilder):
        # A fitted estimator compares the digest of the network later.
        if known is None and required:
            raise ValueError(
                f"{registration.builder.reason} A process that reads a cache of joblib "
                "must register the backbone before."
            )
        return known or registration
    is_worker = parent_process() is not None
    if known is None or (known != registration and known.is_restored and is_worker):
        known = replace(registration, is_restored=True)
        add(known)
    elif required:
        differences = known.differences(registration)
        if any_builder:
            differences = [each for each in differences if each != "builder"]
        if differences:
            raise ValueError(
                f"The backbone {registration.name!r} must be the same one in a pickle "
                "or saved file and in the process that loads it. Got another "
                f"{', '.join(differences)}. Register one of the two under another "
                "name, or load it in a new process."
            )
    return known


def _build(registration: Registration, num_classes: int | None) -> nn.Module:
    network = registration.builder()
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"The builder of the backbone {registration.name!r} must return a "
            f"torch.nn.Module. Got {type(network).__name__}."
        )
    # Copied, since the network of a backbone is frozen and the user's is not.
    return support_other_sizes(copy.deepcopy(network))


def _describe(registration: Registration, network: nn.Module) -> NetworkStructure:
    # Instances of classes of timm and torchvision have the stages of their backbones,
    # and the layouts of their modules are known.
    if not is_timm_network(network):
        structure = torchvision.describe_network(network)
    elif registration.stages is None:
        structure = timm_structure.describe_network(network, registration.preprocessing)
    else:
        structure = timm_structure.describe_layers(network, registration.preprocessing)
    if registration.stages is not None:
        structure = _with_declared_stages(registration, network, structure)
    if registration.n_prefix_tokens:
        n_tokens = registration.n_prefix_tokens
        structure = replace(
            structure,
            trunk_prefix_tokens=(n_tokens,) * len(structure.trunk),
            n_prefix_tokens=lambda layer: n_tokens,
            has_class_token=True,
        )
    if structure.neck is None:
        neck = find_neck(network, structure, registration.preprocessing)
        structure = replace(structure, neck=neck)
    return structure


def _with_declared_stages(
    registration: Registration, network: nn.Module, source: NetworkStructure
) -> NetworkStructure:
    """Describe a network by the parts of its registration.

    Parameters
    ----------
    registration : Registration
        With stages and head.
    network : Module
        Network of the registration.
    source : NetworkStructure
        Layouts of the modules of the network.

    Returns
    -------
    NetworkStructure
        A stage has the layout of its last module. If that is an operation between
        modules of the network, the layout is not known.
    """
    parts = describe_named_parts(network, registration.stages or (), registration.head)
    names = {module: name for name, module in network.named_modules()}
    last: dict[str, str | None] = {}
    for stage, part in (parts.stages or {}).items():
        modules: Any = part  # an nn.Sequential
        last[stage] = names.get(modules[-1]) if len(modules) else None

    def is_channels_last(layer: str) -> bool | None:
        name = last.get(layer, layer)
        return None if name is None else source.is_channels_last(name)

    def n_prefix_tokens(layer: str) -> int:
        name = last.get(layer, layer)
        return 0 if name is None else source.n_prefix_tokens(name)

    return replace(
        parts,
        has_fixed_image_size=source.has_fixed_image_size,
        side_multiple=source.side_multiple,
        is_channels_last=is_channels_last,
        n_prefix_tokens=n_prefix_tokens,
        has_class_token=source.has_class_token,
        pools_other_tokens=source.pools_other_tokens,
        no_weight_decay=source.no_weight_decay,
    )
