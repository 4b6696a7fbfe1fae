"""Training sets and validation sets of one fit, which share what they cache.

A fit trains more than once if it selects its settings: first on parts of the data, then
on all of it. An image is decoded only once, and passes through the frozen prefix once.
"""

import functools
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._images.augmentation import augmentation_for
from sktl._images.augmented_views import APPLY_VIEW, AugmentedViews
from sktl._images.sequence import ImageSequence
from sktl._inference.execution import ExecutionConfig
from sktl._training.datasets import (
    ActivationDataset,
    FixedViewDataset,
    ImageDataset,
    TrainingDataset,
)
from sktl._training.decoded_images import DecodedImages
from sktl._training.frozen_activations import FrozenActivations
from sktl._training.initial_model import FittedModel, InitialModel
from sktl._training.targets import EncodedTargets


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The data of a training.

    Attributes
    ----------
    images : ImageSequence
        Images whose weight is positive.
    targets : EncodedTargets
        Their targets and weights.
    held_out : ndarray of shape (n,), bool
        Mask of the validation set.
    """

    images: ImageSequence
    targets: EncodedTargets
    held_out: NDArray[np.bool_]


def build_frozen_activations(
    estimator: Any,
    model: InitialModel | FittedModel,
    images: ImageSequence | AugmentedViews,
    *,
    n_samples: int | None = None,
    use_memory: bool = True,
    read_only: bool = False,
    distribute: bool = True,
) -> FrozenActivations:
    """Return the activations at the end of the frozen prefix; none is computed yet.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    model : InitialModel or FittedModel
        The network and its preprocessing.
    images : ImageSequence or AugmentedViews
        All images that activations will be read of.
    n_samples : int, default=None
        Number of images of the whole call, of which `images` may be a part: it decides
        the shape of the batches, and so the bits. None: `images` are all.
    use_memory : bool, default=True
        Whether activations are cached in `memory`, if it is given.
    read_only : bool, default=False
        Whether cached activations are read, and none are written.
    distribute : bool, default=True
        Whether worker processes may compute them.

    Returns
    -------
    FrozenActivations
    """
    execution = ExecutionConfig.from_estimator(estimator)
    return FrozenActivations(
        model.network,
        images,
        model.preprocessing,
        execution.for_n_samples(n_samples or len(images)),
        pretrained=model.pretrained,
        prefix=model.prefix if isinstance(model, FittedModel) else None,
        memory=estimator.memory if use_memory else None,
        read_only=read_only,
        distribute=distribute,
    )


class TrainingSets:
    """Training sets and validation sets of some rows of the data.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    model : InitialModel
        The network and its preprocessing.
    data : TrainingData
        Images and targets.
    activations : FrozenActivations
        Of all images of `data`, from `build_frozen_activations`.
    seed : int
        Seed of fixed views.
    """

    def __init__(
        self,
        estimator: Any,
        model: InitialModel,
        data: TrainingData,
        activations: FrozenActivations,
        seed: int,
    ) -> None:
        self._estimator = estimator
        self._model = model
        self._data = data
        self._activations = activations
        self._views: tuple[DecodedImages, FrozenActivations] | None = None
        if self._is_augmented and estimator.augmentation_views is not None:
            self._views = self._make_views(seed)

    def train(self, rows: NDArray[np.intp]) -> TrainingDataset:
        """Return some images outside the validation set, augmented.

        Parameters
        ----------
        rows : ndarray of int
            Positions in the data.

        Returns
        -------
        TrainingDataset
        """
        if not self._is_augmented:  # the frozen prefix sees each image once
            images = self._image_dataset(self._images, rows, rows)
            return ActivationDataset(images, self._activations)
        if self._views is None:  # nothing can be cached
            return self._image_dataset(self._images, rows, rows)
        views, activations = self._views  # the frozen prefix sees each view once
        targets = self._data.targets
        dataset = FixedViewDataset(
            views,
            np.searchsorted(np.flatnonzero(~self._data.held_out), rows),
            targets.y[rows],
            targets.sample_weight[rows],
            n_views=self._estimator.augmentation_views,
            n_jobs=self._estimator.n_jobs,
        )
        return ActivationDataset(dataset, activations)

    def valid(self, rows: NDArray[np.intp]) -> TrainingDataset:
        """Return some images without augmentation.

        Parameters
        ----------
        rows : ndarray of int
            Positions in the data.

        Returns
        -------
        TrainingDataset
        """
        if not self._is_augmented:
            return self.train(rows)
        # Activations of these rows only: they are computed for all images given.
        images = self._data.images.subset(rows.tolist())
        activations = build_frozen_activations(
            self._estimator, self._model, images, n_samples=len(self._data.images)
        )
        positions = np.arange(len(rows))
        dataset = self._image_dataset(self._decoded(images, None), rows, positions)
        return ActivationDataset(dataset, activations)

    @property
    def _is_augmented(self) -> bool:
        return self._estimator.augmentation is not None

    @functools.cached_property
    def _images(self) -> DecodedImages:
        """All images; fixed views do not need them."""
        return self._decoded(self._data.images, self._estimator.augmentation)

    def _make_views(self, seed: int) -> tuple[DecodedImages, FrozenActivations]:
        estimator, preprocessing = self._estimator, self._model.preprocessing
        augmentation = estimator.augmentation
        views = AugmentedViews(
            self._data.images.subset(np.flatnonzero(~self._data.held_out).tolist()),
            augmentation,
            preprocessing,
            n_views=estimator.augmentation_views,
            seed=seed,
        )
        # Without a seed, or with a function, no other fit has the same views.
        seeded = isinstance(estimator.random_state, Integral)
        activations = build_frozen_activations(
            estimator,
            self._model,
            views,
            n_samples=len(self._data.images),
            use_memory=isinstance(augmentation, str) and seeded,
        )
        return DecodedImages(views, APPLY_VIEW, preprocessing.crop_size), activations

    def _decoded(self, images: ImageSequence, augmentation: Any) -> DecodedImages:
        preprocessing = self._model.preprocessing
        augmentation = augmentation_for(augmentation, preprocessing)
        return DecodedImages(images, augmentation, preprocessing.crop_size)

    def _image_dataset(
        self,
        images: DecodedImages,
        rows: NDArray[np.intp],
        positions: NDArray[np.intp],
    ) -> ImageDataset:
        """Return the dataset of some rows, which stand at `positions` of `images`."""
        targets = self._data.targets
        return ImageDataset(
            images,
            positions,
            targets.y[rows],
            targets.sample_weight[rows],
            n_jobs=self._estimator.n_jobs,
        )
