"""Datasets and the data loader of training: shuffled batches of even size.

Images are decoded in threads ahead of the training.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sktl._inference.parallel import map_in_threads, n_decoding_threads
from sktl._training.decoded_images import DecodedImages
from sktl._training.frozen_activations import FrozenActivations

Batch = tuple[Tensor, tuple[Tensor, Tensor]]


class TrainingDataset(Protocol):
    """Interface of the datasets: batches of pixels, or of cached activations."""

    def __len__(self) -> int:
        """Return the number of images."""

    def set_frozen_depth(self, n_frozen: int) -> None:
        """Set the number of frozen parts of the network from now on."""

    def cache_activations(self, n_epochs: int) -> None:
        """Compute what is cached for the next `n_epochs` epochs.

        The trainer calls it before it seeds the global random number generators, which
        other processes and threads may need meanwhile.
        """

    def targets(self, order: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Return encoded targets and weights of some images of this dataset."""

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch; see `ImageDataset.batches`."""


class ImageDataset(Dataset[Any]):
    """Pixels of some images, with targets and weights.

    Parameters
    ----------
    images : DecodedImages
        All images, or all views of them, and their augmentation.
    rows : ndarray of int
        Positions in `images` of the images of this dataset.
    y : ndarray of shape (len(rows), ...)
        Encoded targets.
    sample_weight : ndarray of shape (len(rows),)
        Sample weights.
    n_jobs : int or None
        Number of decoding threads, see `n_decoding_threads`.

    Attributes
    ----------
    n_views : int
        Number of views per image: 1.
    """

    n_views = 1

    def __init__(
        self,
        images: DecodedImages,
        rows: NDArray[np.intp],
        y: NDArray[Any],
        sample_weight: NDArray[np.float64],
        *,
        n_jobs: int | None,
    ) -> None:
        self._images = images
        self._rows = rows
        self._y = torch.from_numpy(y)
        self._sample_weight = torch.from_numpy(sample_weight.astype(np.float32))
        self._n_threads = n_decoding_threads(n_jobs)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    def set_frozen_depth(self, n_frozen: int) -> None:
        """Do nothing: pixels are the input of the whole network."""

    def cache_activations(self, n_epochs: int) -> None:
        """Do nothing: images are decoded when they are needed."""

    def positions(self, order: Sequence[int]) -> NDArray[np.intp]:
        """Return the positions in `images` of some images of this dataset.

        Parameters
        ----------
        order : sequence of int
            Positions in this dataset.

        Returns
        -------
        ndarray of shape (len(order),)
        """
        return self._rows[np.asarray(order)]

    def targets(self, order: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Return targets and weights of some images of this dataset."""
        index = torch.from_numpy(order)
        return self._y[index], self._sample_weight[index]

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Yield pixels, targets and weights, in batches of even size.

        Parameters
        ----------
        order : sequence of int
            Positions in this dataset.
        n_batches : int
            Number of batches; their sizes differ by at most 1.

        Yields
        ------
        pixels : Tensor of shape (n, side, side, 3), uint8
            Augmented.
        target : (Tensor, Tensor)
            Encoded targets and weights, each of length n.

        Raises
        ------
        ValueError
            If an image cannot be read: names the row, the path and the reason.
        """
        largest = -(-len(order) // n_batches)
        decoded = map_in_threads(
            self._images.__getitem__,
            self.positions(order).tolist(),
            n_threads=self._n_threads,
            n_ahead=2 * max(largest, self._n_threads),
        )
        try:
            for part in np.array_split(np.asarray(order), n_batches):
                items = itertools.islice(decoded, len(part))
                pixels = np.stack([self._images.augment(item) for item in items])
                yield torch.from_numpy(pixels), self.targets(part)
        finally:
            decoded.close()


class FixedViewDataset(ImageDataset):
    """One of several fixed views of each image, sampled anew in each epoch.

    Parameters
    ----------
    views : DecodedImages
        All views.
    rows : ndarray of int
        Positions of the images of this dataset: the views of row i are ``i * n_views``
        to ``(i + 1) * n_views - 1``.
    y, sample_weight, n_jobs
        As in `ImageDataset`.
    n_views : int
        Number of views per image.

    Attributes
    ----------
    n_views : int
        Number of views per image.
    """

    def __init__(
        self,
        views: DecodedImages,
        rows: NDArray[np.intp],
        y: NDArray[Any],
        sample_weight: NDArray[np.float64],
        *,
        n_views: int,
        n_jobs: int | None,
    ) -> None:
        super().__init__(views, rows, y, sample_weight, n_jobs=n_jobs)
        self.n_views = n_views

    def positions(self, order: Sequence[int]) -> NDArray[np.intp]:
        """Sample a view of each image from torch's global generator."""
        rows = super().positions(order)
        view = torch.randint(self.n_views, (len(rows),)).numpy()
        return rows * self.n_views + view


class ActivationDataset(Dataset[Any]):
    """Activations at the end of the frozen prefix, in place of pixels.

    Parameters
    ----------
    images : ImageDataset
        The images, with targets and weights. Its pixels are the batches while nothing
        is frozen.
    activations : FrozenActivations
        Activations of all images, or of all views.
    """

    def __init__(self, images: ImageDataset, activations: FrozenActivations) -> None:
        self._images = images
        self._activations = activations
        self._n_frozen = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def set_frozen_depth(self, n_frozen: int) -> None:
        """Set the number of frozen parts of the network from now on."""
        self._n_frozen = n_frozen

    def cache_activations(self, n_epochs: int) -> None:
        """Compute the activations, unless most views would never be sampled."""
        if self._n_frozen and n_epochs >= self._images.n_views:
            self._activations.compute(self._n_frozen)

    def targets(self, order: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Return targets and weights of some images of this dataset."""
        return self._images.targets(order)

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Yield activations, targets and weights; see `ImageDataset.batches`."""
        if self._n_frozen == 0:
            yield from self._images.batches(order, n_batches)
            return
        positions = np.array_split(self._images.positions(order), n_batches)
        parts = np.array_split(np.asarray(order), n_batches)
        for part, rows in zip(parts, positions, strict=True):
            x = self._activations.rows(self._n_frozen, rows.tolist())
            yield x, self._images.targets(part)


class BatchLoader:
    """Data loader of one epoch, in the interface that skorch expects.

    All batches have the same size, at most `batch_size`, give or take one image. A
    small last batch would give poor BatchNorm statistics.

    Parameters
    ----------
    dataset : TrainingDataset
        The images.
    batch_size : int
        Maximum number of images of a batch.
    shuffle : bool, default=False
        Whether the order is drawn from torch's global generator.
    """

    def __init__(
        self, dataset: TrainingDataset, batch_size: int, shuffle: bool = False
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._dataset) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the images once."""
        n = len(self._dataset)
        order = torch.randperm(n).tolist() if self._shuffle else range(n)
        return self._dataset.batches(order, len(self))
