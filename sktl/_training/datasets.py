"""Which images a training step sees: shuffled, varied, in batches of even size.

Decoding runs in threads ahead of the training. Pixels that are the same in every epoch
are kept in memory if they fit into a budget.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sktl._images.augmentation import Augmentation
from sktl._images.augmented_views import AugmentedViews
from sktl._images.sequence import ImageSequence
from sktl._inference.parallel import map_in_threads, n_decoding_threads

_MOST_KEPT = 2**30  # bytes of pixels

Batch = tuple[Tensor, tuple[Tensor, Tensor]]


class ImageDataset(Dataset[Any]):
    """Some rows of the user's images, with labels and weights, to train on.

    Parameters
    ----------
    images : ImageSequence or AugmentedViews
        All of them.
    rows : ndarray of int
        Positions of those that are meant; of views, of their images.
    label : ndarray of int, as long as `rows`
        From 0.
    weight : ndarray of float, as long as `rows`
        How much each counts: 1 on average.
    augmentation : Augmentation
        What is done to an image.
    side : int
        Of the pixels it gives.
    n_jobs : int or None
        Threads that decode, see `n_decoding_threads`.

    Attributes
    ----------
    n_views : int
        Of each image.
    """

    def __init__(
        self,
        images: ImageSequence | AugmentedViews,
        rows: NDArray[np.intp],
        label: NDArray[np.intp],
        weight: NDArray[np.float64],
        *,
        augmentation: Augmentation,
        side: int,
        n_jobs: int | None,
    ) -> None:
        self._images = images
        self._rows = rows
        self.n_views = images.n_views if isinstance(images, AugmentedViews) else 1
        self._label = torch.from_numpy(label.astype(np.int64))
        self._weight = torch.from_numpy(weight.astype(np.float32))
        self._augmentation = augmentation
        self._n_threads = n_decoding_threads(n_jobs)
        self._kept: NDArray[np.uint8] | None = None
        self._is_kept = np.zeros(len(rows), dtype=bool)
        if (
            augmentation.deterministic_gives_pixels
            and len(rows) * side * side * 3 <= _MOST_KEPT
        ):
            self._kept = np.empty((len(rows), side, side, 3), dtype=np.uint8)

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self._rows)

    def set_frozen_depth(self, n_frozen: int) -> None:
        """Nothing: its pixels are for the whole network, whatever of it trains."""

    def cache_activations(self, n_epochs: int) -> None:
        """Nothing: its images are decoded as they are needed."""

    def seen(self, order: Sequence[int]) -> NDArray[np.intp]:
        """Say where, among all images or views, those are that are seen this time.

        Parameters
        ----------
        order : sequence of int
            Positions, from 0 to one less than the length.

        Returns
        -------
        ndarray of shape (len(order),)
            Of views, one of each image, drawn from torch's global generator.
        """
        rows = self._rows[np.asarray(order)]
        if self.n_views == 1:
            return rows
        drawn = torch.randint(self.n_views, (len(rows),)).numpy()
        return rows * self.n_views + drawn

    def targets(self, part: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        """Give labels and weights of some of the images, each of shape (n,)."""
        at = torch.from_numpy(part)
        return self._label[at], self._weight[at]

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Give pixels, labels and weights in that order, in batches of even size.

        Parameters
        ----------
        order : sequence of int
            Positions, from 0 to one less than the length.
        n_batches : int
            How many; they differ in size by at most 1.

        Yields
        ------
        pixels : Tensor of shape (n, side, side, 3), uint8
            Varied by the augmentation.
        target : (Tensor, Tensor)
            Labels and weights, each of shape (n,).

        Raises
        ------
        ValueError
            If an image cannot be read: names the row, the path and the reason.
        """
        largest = -(-len(order) // n_batches)
        prepared = map_in_threads(
            self._prepared,
            list(zip(order, self.seen(order).tolist(), strict=True)),
            n_threads=self._n_threads,
            n_ahead=2 * max(largest, self._n_threads),
        )
        try:
            for part in np.array_split(np.asarray(order), n_batches):
                items = itertools.islice(prepared, len(part))
                pixels = np.stack([self._augmentation.random(item) for item in items])
                yield torch.from_numpy(pixels), self.targets(part)
        finally:
            prepared.close()

    def _prepared(self, places: tuple[int, int]) -> Any:
        position, row = places  # among these images, and among all
        deterministic: Callable[[Any], Any] = self._augmentation.deterministic
        if self._kept is None:
            return deterministic(self._images[row])
        if not self._is_kept[position]:
            self._kept[position] = deterministic(self._images[row])
            self._is_kept[position] = True
        return self._kept[position]


class TrainingDataset(Protocol):
    """What a training takes its batches from: pixels, or what a frozen part gives."""

    def __len__(self) -> int:
        """Give the number of images."""

    def set_frozen_depth(self, n_frozen: int) -> None:
        """Say how many parts of the network, from below, are frozen from now on."""

    def cache_activations(self, n_epochs: int) -> None:
        """Do what is done once, for so many epochs, before the first batch.

        Whoever trains holds the global generators; here other processes may be waited
        for, which need theirs.
        """

    def batches(
        self, order: Sequence[int], n_batches: int
    ) -> Generator[Batch, None, None]:
        """Give images, labels and weights; see `ImageDataset.batches`."""


class BatchLoader:
    """What skorch iterates over: one epoch of batches.

    The last batch is not a small rest, on which BatchNorm would see next to nothing:
    all have the same size, at most `batch_size`, give or take one image.

    Parameters
    ----------
    dataset : ImageDataset or ActivationDataset
        The images.
    batch_size : int
        Largest number of images of a batch.
    shuffle : bool, default=False
        Whether in an order drawn from torch's global generator.
    """

    def __init__(
        self, dataset: TrainingDataset, batch_size: int, shuffle: bool = False
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Give the number of batches."""
        return -(-len(self._dataset) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Go through the images once."""
        n = len(self._dataset)
        order = torch.randperm(n).tolist() if self._shuffle else range(n)
        return self._dataset.batches(order, len(self))
