"""A name and weights lead to a backbone: bundled, of torchvision, or registered.

A process keeps the networks it used last: clones of an estimator share one frozen copy.
"""

import copy
import difflib
import functools
import hashlib
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from threading import RLock
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn
from torchvision import models

from sktl._backbones.backbone import Backbone
from sktl._backbones.resnet_mini import IMAGE_SIZE, MEAN, STD, ResNetMini
from sktl._backbones.stages import (
    check_staged_model,
    last_linear,
    reason_not_staged,
    split_into_stages,
)
from sktl._backbones.weights import (
    SUFFIXES,
    fetch_weights,
    file_digest,
    load_weights,
    load_weights_into,
    skip_weight_allocation,
)
from sktl._images.preprocessing import Preprocessing
from sktl._utils.random_state import preserve_rng_state
from sktl._utils.tensor_file import state_dict_digest

# A grid over strategies uses two or three networks at once.
_N_KEPT = 4

# Comes with the library, and works without a network connection.
_BUNDLED = "resnet_mini"
_MIN_SIZE = 8  # pixels: one position is left of that after three halvings

# Resolutions are measured at no less, where halving is not yet blurred by rounding.
_MEASURED_AT = 224


@dataclass(frozen=True)
class _Recipe:
    """How to come to a backbone, with all questions about names answered."""

    # Gives the network for that many categories, or for as many as it has.
    build: Callable[[int | None], nn.Module]
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None
    min_size: int = 1
    # Which of torchvision's weights these are, or are taken for.
    origin: str = ""
    file: str | None = None
    registered: bool = False


_registered: dict[str, _Recipe] = {}
_kept: OrderedDict[tuple[str, str, str], Backbone] = OrderedDict()
# Loading may build what is registered, and that may load another backbone.
_lock = RLock()


def list_backbones() -> list[str]:
    """Name every backbone that can be loaded.

    Returns
    -------
    list of str
        The bundled network, the classification models of torchvision, and what was
        registered, sorted.

    Examples
    --------
    >>> from sktl import list_backbones
    >>> [name for name in list_backbones() if name.startswith("squeezenet")]
    ['squeezenet1_0', 'squeezenet1_1']
    """
    return sorted({*_builtin(), *_registered})


def register_backbone(
    name: str,
    builder: Callable[[], nn.Module],
    *,
    preprocessing: Any,
    categories: Sequence[str] | None = None,
) -> None:
    """Make a network of your own available under a name, in this process.

    A name that was registered before now means the new network. Other processes, such
    as the workers of ``GridSearchCV(n_jobs=2)``, know the name only if they import a
    module that registers it.

    Parameters
    ----------
    name : str
        Not that of the bundled network or of a model of torchvision.

    builder : callable
        Called without arguments; gives a network that takes ``(n, 3, h, w)`` and gives
        ``(n, n_categories)``. ``weights="DEFAULT"`` and ``weights=None`` mean the
        network as it comes, with torch's random numbers seeded; a path means that its
        state dict is put in. To have stages, the network must be an instance of a
        class of ``torchvision.models``, or have attributes ``stages`` (a ModuleDict,
        or modules in order) and ``head`` which, run in order, are what it does.

    preprocessing : Preprocessing or torchvision's ImageClassification
        What images go through before the network sees them.

    categories : sequence of str, default=None
        Names of the columns of the output.

    Raises
    ------
    TypeError
        If `name` is not a str, `builder` is not a function or `preprocessing` is
        neither of the two.
    ValueError
        If there is a network of that name that was not registered, or it is empty.

    Examples
    --------
    >>> from torchvision.models import ResNet
    >>> from torchvision.models.resnet import BasicBlock
    >>> from sktl import Preprocessing, register_backbone
    >>> register_backbone(
    ...     "resnet10",
    ...     lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    ...     preprocessing=Preprocessing(resize_size=64, crop_size=64),
    ... )
    """
    if not isinstance(name, str):
        raise TypeError(f"The name of a backbone must be a str. Got {name!r}.")
    if not name or name in _builtin():
        raise ValueError(
            "The name of a registered backbone must not be empty nor that of the "
            f"bundled network or of a model of torchvision. Got {name!r}. Choose "
            "another."
        )
    if not callable(builder) or isinstance(builder, nn.Module):
        raise TypeError(
            "builder must be a function that gives a network. Got "
            f"{type(builder).__name__}. Of a network, pass `lambda: network`."
        )
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = Preprocessing.from_torchvision(preprocessing)

    def build(num_classes: int | None) -> nn.Module:
        network = builder()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"The builder of the backbone {name!r} must give a torch.nn.Module. "
                f"Got {type(network).__name__}."
            )
        # What is loaded gets frozen; what the user holds must not be.
        return copy.deepcopy(network)

    if isinstance(categories, str):
        raise TypeError(f"categories must be a list of names. Got {categories!r}.")
    names = None if categories is None else tuple(categories)
    with _lock:
        _registered[name] = _Recipe(build, preprocessing, names, registered=True)
        for key in [key for key in _kept if key[0] == name]:
            del _kept[key]


def load_backbone(
    name: str,
    weights: str | PathLike[str] | None = "DEFAULT",
    *,
    random_state: int = 0,
    progress: bool = False,
) -> Backbone:
    """Give the backbone of that name with those weights.

    Parameters
    ----------
    name : str
        One of `list_backbones`.

    weights : str, path-like or None, default="DEFAULT"
        Name of weights of torchvision, fetched if they are not on this machine; a
        path to a state dict (``.pth``, ``.pt``, ``.safetensors``); None for random.
        A file of torchvision's own name brings the preprocessing and categories of
        those weights, any other those of the default weights; categories only if the
        head has as many.

    random_state : int, default=0
        Seed of random weights. The global random state is left as it is.

    progress : bool, default=False
        Whether to show a progress bar of a download.

    Returns
    -------
    Backbone
        Shared by all who ask for the same; do not change it.

    Raises
    ------
    ConnectionError
        If weights must be fetched and cannot be.
    FileNotFoundError
        If there is no file at the path given.
    TypeError
        If `weights` is of another type, or a registered builder gives no network.
    ValueError
        If a name is unknown, or the file is damaged, not plain weights, or not those
        of this network.
    """
    # Under the lock also while fetching: whoever waits needs the same file, mostly.
    with _lock:
        recipe = _recipe(name, weights, progress)
        identity = f"seed {random_state}"
        if recipe.file is not None:
            identity = file_digest(recipe.file)
        key = (name, recipe.origin, identity)
        if key not in _kept:
            backbone = _load(name, recipe, random_state)
            if recipe.file is not None and file_digest(recipe.file) != identity:
                raise ValueError(
                    f"The weights {recipe.file!r} must not change while they are "
                    "read. They did. Wait until they are written, and try again."
                )
            _kept[key] = backbone
            if len(_kept) > _N_KEPT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone by its names: enough to load the same in another process.

    Attributes
    ----------
    name, weights, random_state
        As in `load_backbone`.
    digest : str
        What it has.
    """

    name: str
    weights: str | None
    random_state: int
    digest: str

    @classmethod
    def to(
        cls,
        backbone: Backbone,
        weights: str | PathLike[str] | None,
        random_state: int = 0,
    ) -> Self:
        """Refer to a backbone that was loaded with these weights.

        Parameters
        ----------
        backbone : Backbone
            From `load_backbone`.
        weights, random_state
            As it was asked for.

        Returns
        -------
        BackboneSpec
            Good in any working directory.
        """
        if isinstance(weights, PathLike) or (
            weights is not None
            and (weights.endswith(SUFFIXES) or os.path.basename(weights) != weights)
        ):
            weights = os.path.join(os.getcwd(), os.path.expanduser(weights))
        return cls(backbone.name, weights, random_state, backbone.digest)

    def load(self) -> Backbone:
        """Load it, unless this process has it.

        Raises
        ------
        FileNotFoundError, ConnectionError
            If this machine does not have the weights; names both.
        ValueError
            If it has others, and as `load_backbone` does.
        """
        what = f"The weights {self.weights!r} of {self.name!r}"
        where = f"the machine {socket.gethostname()!r}, which computes with them"
        try:
            backbone = load_backbone(
                self.name, self.weights, random_state=self.random_state
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise type(error)(
                f"{what} must be on {where}. They are not: {error}"
            ) from error
        if backbone.digest != self.digest:
            raise ValueError(
                f"{what} must be those with the digest {self.digest[:12]} on {where}, "
                f"too. Got {backbone.digest[:12]}. Copy the file there, or put it "
                "where all machines see it."
            )
        return backbone


# What is cached here is asked for in each fit and transform.
@functools.cache
def _builtin() -> frozenset[str]:
    return frozenset([_BUNDLED, *models.list_models(module=models)])


def _recipe(name: str, weights: str | PathLike[str] | None, progress: bool) -> _Recipe:
    if name in _registered:
        recipe = _registered[name]
        as_built = weights is None or weights == "DEFAULT"
        file = None if as_built else _path(name, weights, ["DEFAULT"])
        return replace(recipe, file=file)
    if name not in _builtin():
        close = difflib.get_close_matches(str(name), list_backbones())
        raise ValueError(
            f"There is no backbone {name!r}. "
            f"{'Do you mean ' + ' or '.join(close) + '? ' if close else ''}"
            "list_backbones() has all names; what register_backbone added is known "
            "only in processes that import a module which registers it."
        )
    if name == _BUNDLED:
        return _bundled_recipe(weights)
    enum = _weights_of(name)
    member, file = enum.DEFAULT, None
    short = str(weights).removeprefix(f"{enum.__name__}.")
    if short in enum.__members__:
        member = enum[short]
        file = str(fetch_weights(member.url, progress=progress))
    elif weights is not None:
        file = _path(name, weights, enum.__members__)
        # Fetched by hand and given by path, they are still the same weights.
        member = _weights_by_file(name).get(os.path.basename(file), member)
    return _torchvision_recipe(name, member, file)


@functools.cache
def _weights_of(name: str) -> Any:
    return models.get_model_weights(name)


@functools.cache
def _weights_by_file(name: str) -> dict[str, Any]:
    return {os.path.basename(each.url): each for each in _weights_of(name)}


@functools.cache
def _bundled_categories(file: str) -> tuple[str, ...]:
    with safe_open(file, framework="numpy") as opened:
        return tuple(opened.metadata()["categories"].splitlines())


def _bundled_recipe(weights: str | PathLike[str] | None) -> _Recipe:
    package = os.path.dirname(os.path.dirname(__file__))
    file = os.path.join(package, "data", f"{_BUNDLED}.safetensors")
    categories = _bundled_categories(file)
    preprocessing = Preprocessing(IMAGE_SIZE, IMAGE_SIZE, mean=MEAN, std=STD)
    if weights is None:
        return _Recipe(ResNetMini, preprocessing, None, _MIN_SIZE)
    if weights != "DEFAULT":
        file = _path(_BUNDLED, weights, ["DEFAULT"])
    return _Recipe(ResNetMini, preprocessing, categories, _MIN_SIZE, file=file)


@functools.lru_cache(_N_KEPT)
def _torchvision_recipe(name: str, member: Any, file: str | None) -> _Recipe:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # As these models are with weights; torchvision changes them afterwards.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": member.meta["min_size"][0]}

    def build(num_classes: int | None) -> nn.Module:
        count = {} if num_classes is None else {"num_classes": num_classes}
        return models.get_model(name, weights=None, **options, **count)

    categories = None if file is None else member.meta["categories"]
    return _Recipe(
        build,
        Preprocessing.from_torchvision(member.transforms()),
        None if categories is None else tuple(categories),
        max(member.meta["min_size"]),
        member.name,
        file,
    )


def _path(name: str, weights: str | PathLike[str] | None, known: Iterable[str]) -> str:
    if isinstance(weights, PathLike):
        return os.fspath(weights)
    if not isinstance(weights, str):
        raise TypeError(
            f"weights must be a str, a path or None. Got {weights!r} of type "
            f"{type(weights).__name__}."
        )
    if not weights.endswith(SUFFIXES) and os.path.basename(weights) == weights:
        raise ValueError(
            f"The backbone {name!r} has the weights {', '.join(known)}; a path ends "
            f"in {', '.join(SUFFIXES)}. Got {weights!r}."
        )
    return weights


def _load(name: str, recipe: _Recipe, seed: int) -> Backbone:
    network, digest = _network(name, recipe, seed)
    crop_size = recipe.preprocessing.crop_size
    parts = None
    if reason_not_staged(network) is None:
        parts = split_into_stages(network, max(crop_size, _MEASURED_AT))
    if recipe.registered:
        if parts is not None:
            check_staged_model(network, parts, crop_size)
        # The parameters alone do not tell a stride of 1 from one of 2, and a name that
        # is registered again may bring another preprocessing.
        everything = f"{network} {recipe.preprocessing} {digest}"
        digest = hashlib.sha256(everything.encode()).hexdigest()
    return Backbone(
        name,
        digest,
        network,
        parts,
        recipe.preprocessing,
        _fitting_categories(name, recipe, network),
        recipe.min_size,
    )


def _network(name: str, recipe: _Recipe, seed: int) -> tuple[nn.Module, str]:
    """Give the network of a recipe, frozen, and the digest of its weights."""
    weights = None if recipe.file is None else load_weights(recipe.file)
    network = _built(recipe, None, seed)
    if weights is not None:
        last = last_linear(network)
        rows = weights.state_dict.get(f"{last}.weight")
        if not recipe.registered and rows is not None and rows.ndim > 0:
            # Saved after fine-tuning on another number of categories.
            if len(rows) != _n_outputs(network):
                network = _built(recipe, len(rows), seed)
        origin = f"The weights {recipe.file!r} for the backbone {name!r}"
        load_weights_into(network, weights.state_dict, origin)
    network.to("cpu", torch.float32).eval().requires_grad_(False)
    digest = (
        state_dict_digest(network.state_dict()) if weights is None else weights.digest
    )
    return network, digest


def _built(recipe: _Recipe, num_classes: int | None, seed: int) -> nn.Module:
    unfilled = recipe.file is not None and not recipe.registered
    with preserve_rng_state(), skip_weight_allocation() if unfilled else nullcontext():
        torch.default_generator.manual_seed(seed)
        return recipe.build(num_classes)


def _n_outputs(network: nn.Module) -> int | None:
    name = last_linear(network)
    return None if name is None else len(network.get_parameter(f"{name}.weight"))


def _fitting_categories(
    name: str, recipe: _Recipe, network: nn.Module
) -> tuple[str, ...] | None:
    n_outputs = _n_outputs(network)
    categories = recipe.categories
    if categories is None or n_outputs in (None, len(categories)):
        return categories
    if recipe.registered:
        raise ValueError(
            f"categories must name each output of the backbone {name!r}, which has "
            f"{n_outputs}. Got {len(categories)}."
        )
    return None
