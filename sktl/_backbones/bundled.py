"""The bundled backbone ``resnet_mini``, which needs no network connection."""

import functools
import os
from collections.abc import Collection
from os import PathLike

from safetensors import safe_open

from sktl._backbones.resnet_mini import IMAGE_SIZE, MEAN, STD, ResNetMini
from sktl._backbones.source import BackboneDefinition, weights_path
from sktl._backbones.stages import describe_network
from sktl._images.preprocessing import Preprocessing

_NAME = "resnet_mini"
_LICENSE = "BSD-3-Clause; trained on images of ImageNet, which permits research use"
_MIN_SIZE = 8  # pixels: 1 x 1 position is left after three halvings
_FILE = os.path.join(
    os.path.dirname(os.path.dirname(__file__)), "data", f"{_NAME}.safetensors"
)


def owns(name: str) -> bool:
    """Return whether a name is that of the bundled backbone."""
    return name == _NAME


def names(pretrained: bool = False) -> Collection[str]:
    """Return the name of the bundled backbone."""
    return frozenset([_NAME])


def resolve(
    name: str,
    weights: str | PathLike[str] | None,
    progress: bool,
    *,
    fetch: bool = True,
) -> BackboneDefinition:
    """Return the definition of the bundled backbone; see `BackboneSource`."""
    file = _FILE if weights == "DEFAULT" else None
    if weights is not None and file is None:
        file = weights_path(name, weights, ["DEFAULT"])
    return BackboneDefinition(
        ResNetMini,
        describe_network,
        Preprocessing(IMAGE_SIZE, IMAGE_SIZE, mean=MEAN, std=STD),
        None if file is None else _categories(),
        min_size=_MIN_SIZE,
        file=file,
        known_weights=("DEFAULT",),
        license=_LICENSE if file == _FILE else None,
    )


@functools.cache
def _categories() -> tuple[str, ...]:
    with safe_open(_FILE, framework="numpy") as opened:
        return tuple(opened.metadata()["categories"].splitlines())
