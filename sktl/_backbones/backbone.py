"""A backbone: a network, its stages and head, preprocessing and categories, together.

torchvision's weights carry the transform they were trained with and the names of their
categories, so that these cannot drift apart; a `Backbone` carries the stages as well.
"""

from dataclasses import dataclass

from torch import nn
from torchvision import models

from sktl._backbones.stages import StagedModel, last_linear, reason_not_staged
from sktl._images.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class Backbone:
    """A pretrained network and all that belongs to it.

    It is shared by all who load it: do not change it. ``copy.deepcopy(backbone)``
    gives a copy to train, whose stages are again parts of its network.

    Attributes
    ----------
    name : str
        As `load_backbone` was asked for it.
    digest : str
        64 hexadecimal digits, another for other weights: sha256 of the weights file
        or, without one, of the parameters. For a registered backbone also of the
        printed form of the network and the preprocessing; not of the code of its
        ``forward``.
    network : Module
        On the CPU, float32, in evaluation mode, no parameter requires a gradient.
        Takes ``(n, 3, h, w)``, gives ``(n, n_categories)``.
    staged_model : StagedModel or None
        Its stages and head, or None if it cannot be cut.
    preprocessing : Preprocessing
        What the weights were trained with.
    categories : tuple of str or None
        Names of the columns of the output. None for weights that have none.
    min_size : int
        Least side in pixels of an image.
    """

    name: str
    digest: str
    network: nn.Module
    staged_model: StagedModel | None
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None
    min_size: int

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, in order; each takes and gives ``(n, c, h, w)``.

        Raises
        ------
        ValueError
            If the network cannot be cut; says why.
        """
        return self._require_stages().stages

    @property
    def head(self) -> nn.Module:
        """From the output of the last stage to that of the network.

        Raises
        ------
        ValueError
            If the network cannot be cut; says why.
        """
        return self._require_stages().head

    @property
    def reason_without_stages(self) -> str | None:
        """Why the network has no stages, or None if it has."""
        return (
            None if self.staged_model is not None else reason_not_staged(self.network)
        )

    @property
    def penultimate(self) -> str:
        """Name of the module of `network` whose input is the penultimate feature.

        Raises
        ------
        ValueError
            If there is no linear layer.
        """
        name = last_linear(self.network)
        if name is None:
            raise ValueError(
                "The penultimate layer is what the last linear layer of a network "
                f"sees. The backbone {self.name!r} has none. Name a stage or a module "
                "instead."
            )
        return name

    @property
    def last_linear(self) -> nn.Module:
        """The module that `penultimate` names: an ``nn.Linear`` or an ``nn.Conv2d``."""
        return self.network.get_submodule(self.penultimate)

    def preprocessing_at(self, image_size: int | None) -> Preprocessing:
        """Give the preprocessing for another size of image.

        Parameters
        ----------
        image_size : int or None
            Side in pixels to resize and crop to, or None for the weights' own.

        Returns
        -------
        Preprocessing
            For that size.

        Raises
        ------
        ValueError
            If the network cannot take images of that size.
        """
        own = self.preprocessing
        if image_size is None:
            return own
        fixed = isinstance(self.network, models.VisionTransformer | models.MaxVit)
        if fixed and image_size != own.crop_size:
            raise ValueError(
                f"The backbone {self.name!r} takes images of {own.crop_size} pixels "
                f"a side only. Got image_size={image_size}. Leave it None, or choose "
                "a convolutional network."
            )
        if image_size < self.min_size:
            raise ValueError(
                f"image_size must be at least {self.min_size} for the backbone "
                f"{self.name!r}. Got {image_size}."
            )
        return own.with_image_size(image_size)

    def _require_stages(self) -> StagedModel:
        if self.staged_model is None:
            raise ValueError(
                f"The backbone {self.name!r} has no stages: "
                f"{self.reason_without_stages}. Use its penultimate layer or the name "
                "of one of its modules, or choose another backbone."
            )
        return self.staged_model
