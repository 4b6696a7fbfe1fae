"""Backbones that `register_backbone` adds, in this process."""

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from os import PathLike

from torch import nn

from sktl._backbones import torchvision
from sktl._backbones.source import BackboneDefinition, weights_path
from sktl._images.preprocessing import Preprocessing

definitions: dict[str, BackboneDefinition] = {}


def owns(name: str) -> bool:
    """Return whether a name was registered."""
    return name in names()


def names(pretrained: bool = False) -> Collection[str]:
    """Return the names of the registered backbones."""
    return tuple(definitions)  # a copy, since other threads may register


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
    return replace(definitions[name], file=file)


def add(
    name: str,
    builder: Callable[[], nn.Module],
    preprocessing: Preprocessing,
    categories: tuple[str, ...] | None,
    layout: str | None = None,
) -> None:
    """Add a definition, or replace the one with that name.

    Parameters
    ----------
    name, builder, preprocessing, categories, layout
        Valid arguments of `register_backbone`.
    """

    def build(num_classes: int | None) -> nn.Module:
        network = builder()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"The builder of the backbone {name!r} must return a torch.nn.Module. "
                f"Got {type(network).__name__}."
            )
        # Copied, since the network of a backbone is frozen and the user's is not.
        return copy.deepcopy(network)

    definitions[name] = BackboneDefinition(
        build,
        # Instances of torchvision's classes have the same stages as its backbones.
        torchvision.describe_network,
        preprocessing,
        categories,
        has_fixed_image_size=None,
        is_registered=True,
        adapt_state_dict=torchvision.adapt_state_dict,
        layout=layout,
        known_weights=("DEFAULT",),
    )
