"""Backbones that `register_backbone` adds, in this process."""

import copy
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from os import PathLike

from torch import nn

from sktl._backbones import timm_structure, torchvision
from sktl._backbones.named_modules import describe_named_parts
from sktl._backbones.registration import Registration
from sktl._backbones.source import (
    BackboneDefinition,
    NetworkStructure,
    weights_path,
)

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


def restore(registration: Registration, *, required: bool = True) -> None:
    """Register a backbone that comes from a pickle or from a saved file.

    It replaces one that was restored before, since a worker process outlives a
    registration. It does not replace one that the user of this process registered.

    Parameters
    ----------
    registration : Registration
        Of another process, or of this one.
    required : bool, default=True
        Whether an object that is loaded has this backbone.

    Raises
    ------
    ValueError
        If it is required, and the user registered another backbone under the name.
    """
    known = registrations.get(registration.name)
    if known == registration:
        return
    if known is None or known.is_restored:
        add(replace(registration, is_restored=True))
    elif required:
        differences = ", ".join(known.differences(registration))
        raise ValueError(
            f"The backbone {registration.name!r} must be the same one in a pickle and "
            f"in the process that loads it. Got another {differences}. Register one of "
            "the two under another name."
        )


def _build(registration: Registration, num_classes: int | None) -> nn.Module:
    network = registration.builder()
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"The builder of the backbone {registration.name!r} must return a "
            f"torch.nn.Module. Got {type(network).__name__}."
        )
    # Copied, since the network of a backbone is frozen and the user's is not.
    return copy.deepcopy(network)


def _describe(registration: Registration, network: nn.Module) -> NetworkStructure:
    # Instances of classes of torchvision and timm have the stages of their backbones.
    structure = torchvision.describe_network(network)
    if structure.reason_not_staged and timm_structure.is_timm_network(network):
        structure = timm_structure.describe_network(network, registration.preprocessing)
    if registration.n_prefix_tokens:
        n_tokens = registration.n_prefix_tokens
        structure = replace(
            structure, n_prefix_tokens=lambda layer: n_tokens, has_class_token=True
        )
    if registration.stages is None:
        return structure
    parts = describe_named_parts(network, registration.stages, registration.head)
    return replace(
        structure,
        trunk=(),
        stages=parts.stages,
        head=parts.head,
        neck=None,
        reason_not_staged=None,
    )
