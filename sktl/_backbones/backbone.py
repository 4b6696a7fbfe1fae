"""Backbone: a network with its stages, head, preprocessing and categories.

As in torchvision, the weights carry their preprocessing and the names of their
categories, so these always match.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, Self, TypeVar

from torch import nn

from sktl._backbones.source import BackboneDefinition, Label, NetworkStructure
from sktl._backbones.stages import StagedModel, last_linear, split_into_stages
from sktl._images.preprocessing import Preprocessing
from sktl._utils.default_dtype import float32_default_if_needed

# Resolutions are measured at this side at least, where rounding has little effect.
_MIN_MEASURED_SIDE = 224

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """A network with its weights.

    Attributes
    ----------
    network : Module
        The network, as in `Backbone`.
    digest : str
        Digest of the weights.
    missing_head : tuple of str
        Names of tensors of the head that the weights file lacks; their values are NaN.
    removed : str
        What was removed from the content of the file, empty if nothing was.
    """

    network: nn.Module
    digest: str
    missing_head: tuple[str, ...] = ()
    removed: str = ""


class Backbone:
    """A pretrained network and all that belongs to it.

    It is shared by everyone who loads it: do not modify it. ``copy.deepcopy(backbone)``
    returns a copy to train, whose stages are again modules of its network.

    Parameters
    ----------
    name : str
        Name given to `load_backbone`.
    digest : str
        64 hexadecimal digits that depend on the weights: sha256 of the weights file
        or, without one, of the parameters. For a registered backbone also of the
        printed network and the preprocessing, but not of the code of its ``forward``.
    definition : BackboneDefinition
        Source of the network.
    load : callable
        Returns the `LoadedNetwork`. Called once, when it is first accessed.

    Attributes
    ----------
    preprocessing : Preprocessing
        Transform the weights were trained with.
    min_size : int
        Minimum side of an image in pixels.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        definition: BackboneDefinition,
        load: Callable[[], LoadedNetwork],
    ) -> None:
        self.name = name
        self.digest = digest
        self.definition = definition
        self.preprocessing = definition.preprocessing
        self.min_size = definition.min_size
        self._load = load
        self._loaded: LoadedNetwork | None = None
        self._computed: dict[str, Any] = {}
        self._print_state = "never"  # or "when loaded", "done"
        self._lock = RLock()

    @property
    def is_loaded(self) -> bool:
        """Whether the network is in memory."""
        return self._loaded is not None

    @property
    def network(self) -> nn.Module:
        """The network, with weights that are read on first access.

        On the CPU, float32, in evaluation mode, without parameters that require a
        gradient. Maps ``(n, 3, h, w)`` to ``(n, n_categories)``.

        Raises
        ------
        FileNotFoundError
            If the weights file was removed.
        ValueError
            If the weights are invalid or do not match the network.
        """
        return self._load_once().network

    @property
    def missing_head(self) -> tuple[str, ...]:
        """Names of tensors of the head that the weights file lacks; loads the file."""
        return self._load_once().missing_head

    def print_removed(self) -> None:
        """Print what was removed from the weights file, once, when it is read."""
        with self._lock:
            if self._print_state == "never":
                self._print_state = "when loaded"
            self._print_if_loaded()

    def _load_once(self) -> LoadedNetwork:
        if self._loaded is None:
            with self._lock:
                if self._loaded is None:
                    self._loaded = self._load()
                self._print_if_loaded()
        return self._loaded

    def _print_if_loaded(self) -> None:
        if self._print_state == "when loaded" and self._loaded is not None:
            self._print_state = "done"
            if self._loaded.removed:
                print(self._loaded.removed)

    def _compute_once(self, name: str, compute: Callable[[], Value]) -> Value:
        """Return a cached value that is computed under the lock of this backbone.

        `functools.cached_property` has one lock for all instances in Python 3.11:
        another backbone would wait, and a network that is made from one would deadlock.
        """
        with self._lock:
            if name not in self._computed:
                self._computed[name] = compute()
            value: Value = self._computed[name]
        return value

    @property
    def structure(self) -> NetworkStructure:
        """The structure of the network."""
        return self._compute_once(
            "structure", lambda: self.definition.describe(self.network)
        )

    @property
    def staged_model(self) -> StagedModel | None:
        """Stages and head, or None if the network cannot be split."""
        return self._compute_once("staged_model", self._split)

    def _split(self) -> StagedModel | None:
        if self.structure.reason_not_staged is not None:
            return None
        side = self.preprocessing.crop_size
        if not self.structure.has_fixed_image_size:
            side = max(side, _MIN_MEASURED_SIDE)
        with float32_default_if_needed():
            return split_into_stages(
                self.structure, side, self.preprocessing.n_channels
            )

    @property
    def categories(self) -> tuple[Label, ...] | None:
        """Names or labels of the outputs, or None if the weights have none."""
        names = self.definition.categories
        if names is None or self.missing_head:
            return None
        # The head of a fine-tuned network has another number of outputs.
        return names if self.n_outputs in (None, len(names)) else None

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, in order; input and output are ``(n, c, h, w)``.

        Raises
        ------
        ValueError
            If the network cannot be split, with the reason.
        """
        return self._require_stages().stages

    @property
    def head(self) -> nn.Module:
        """The module from the output of the last stage to that of the network.

        Raises
        ------
        ValueError
            If the network cannot be split, with the reason.
        """
        return self._require_stages().head

    @property
    def neck(self) -> nn.Module | None:
        """The module from the output of the last stage to the penultimate features.

        From the images, if the network cannot be split. None if the penultimate
        features are the input of the last linear layer.
        """
        if self.staged_model is not None:
            return self.staged_model.neck
        blocks = self.structure.neck
        return None if blocks is None else nn.Sequential(*blocks)

    @property
    def reason_without_stages(self) -> str | None:
        """Why the network has no stages, or None if it has stages."""
        return self.structure.reason_not_staged

    @property
    def penultimate(self) -> str:
        """Name of the module whose input is the penultimate feature.

        Raises
        ------
        ValueError
            If there is no linear layer.
        """
        name = last_linear(self.network, self.structure)
        if name is None:
            raise ValueError(
                "The penultimate layer is the input of the last linear layer of a "
                f"network. The backbone {self.name!r} has no linear layer. Choose a "
                "stage or a module instead."
            )
        return name

    @property
    def missing_below_penultimate(self) -> list[str]:
        """Names of missing tensors that the penultimate features need."""
        if self.neck is None:
            own = f"{self.penultimate}."
            return [name for name in self.missing_head if not name.startswith(own)]
        needed = {id(parameter) for parameter in self.neck.parameters()}
        tensors = dict(self.network.named_parameters())
        return [name for name in self.missing_head if id(tensors.get(name)) in needed]

    @property
    def last_linear(self) -> nn.Module:
        """The module named `penultimate`: an ``nn.Linear`` or an ``nn.Conv2d``."""
        return self.network.get_submodule(self.penultimate)

    @property
    def n_outputs(self) -> int | None:
        """Number of outputs of the last linear layer, or None if there is none."""
        name = last_linear(self.network, self.structure)
        if name is None:
            return None
        return len(self.network.get_parameter(f"{name}.weight"))

    @property
    def has_fixed_image_size(self) -> bool:
        """Whether the network supports only images of one size."""
        is_fixed = self.definition.has_fixed_image_size
        return self.structure.has_fixed_image_size if is_fixed is None else is_fixed

    @property
    def has_classification_head(self) -> bool:
        """Whether a layer with parameters follows the penultimate features."""
        neck = self.structure.neck
        if neck is None:
            return last_linear(self.network, self.structure) is not None
        below = {parameter for block in neck for parameter in block.parameters()}
        scope = self.structure.head or [self.network]
        return any(
            parameter not in below
            for block in scope
            for parameter in block.parameters()
        )

    @property
    def returns_embeddings(self) -> bool:
        """Whether the outputs are an embedding of the image, as of CLIP."""
        width = self.definition.embedding_width
        # A network that was fine-tuned on categories has another number of outputs.
        return width is not None and self.n_outputs in (None, width)

    def preprocessing_at(
        self, image_size: int | None, resize: str | None = None
    ) -> Preprocessing:
        """Return the preprocessing for another image size or resize mode.

        Parameters
        ----------
        image_size : int or None
            Side in pixels to resize and crop to, or None for that of the weights.
        resize : str or None
            As in `Preprocessing`, or None for that of the weights.

        Returns
        -------
        Preprocessing
            With that size and mode.

        Raises
        ------
        ValueError
            If the network does not support images of that size.
        """
        own = self.preprocessing
        if resize is not None:
            own = replace(own, resize=resize)
        if image_size is None:
            return own
        if self.has_fixed_image_size and image_size != own.crop_size:
            raise ValueError(
                f"The backbone {self.name!r} supports only images of {own.crop_size} "
                f"pixels a side. Got image_size={image_size}. Set image_size=None, or "
                "choose another network, such as a convolutional network or a vision "
                "transformer."
            )
        if image_size < self.min_size:
            raise ValueError(
                f"image_size must be at least {self.min_size} for the backbone "
                f"{self.name!r}. Got {image_size}. Increase image_size, or choose "
                "another backbone."
            )
        if self.definition.has_fixed_image_size is None:
            self._check_multiple(image_size, self.structure.side_multiple)
        return own.with_image_size(image_size)

    def _check_multiple(self, image_size: int, multiple: int) -> None:
        if image_size % multiple:
            below = image_size // multiple * multiple
            nearest = [side for side in (below, below + multiple) if side > 0]
            raise ValueError(
                f"image_size must be a multiple of {multiple} for the backbone "
                f"{self.name!r}, which divides images into patches of that side. Got "
                f"{image_size}. Choose {' or '.join(map(str, nearest))}."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a backbone with a copy of the network, and stages of that copy."""
        network = copy.deepcopy(self.network, memo)
        loaded = replace(self._load_once(), network=network)
        return type(self)(self.name, self.digest, self.definition, lambda: loaded)

    def _require_stages(self) -> StagedModel:
        if self.staged_model is None:
            raise ValueError(
                f"The backbone {self.name!r} has no stages: "
                f"{self.reason_without_stages}. Use its penultimate layer or the name "
                "of one of its modules, or choose another backbone."
            )
        return self.staged_model
