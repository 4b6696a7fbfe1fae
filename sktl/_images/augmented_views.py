"""A fixed number of augmented views per image.

A view is determined by a seed, the content hash of its image and its view index, but
not by the position of the image. The views of an image are therefore the same in each
epoch and fold, and can be cached like images.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from sktl._images.augmentation import Augmentation, augmentation_for
from sktl._images.preprocessing import Preprocessing
from sktl._images.sequence import ImageSequence
from sktl._utils.random_state import temporary_seed

View = Callable[[], NDArray[np.uint8]]  # returns pixels (side, side, 3)

_CPU = torch.device("cpu")

# Evaluates a view, in the form of an `Augmentation` of views.
APPLY_VIEW = Augmentation(lambda view: view, lambda view: view(), False)


class AugmentedViews:
    """Sequence of a fixed number of augmented views of each image.

    View v of image i has index ``i * n_views + v``. On access, its image is decoded and
    the view is returned as a function that applies the random transform. The function
    draws from the global random number generators and is called in the training thread.

    Parameters
    ----------
    images : ImageSequence
        Images.
    augmentation : str or callable
        Augmentation, as in `augmentation_for`.
    preprocessing : Preprocessing
        Size and interpolation.
    n_views : int
        Number of views per image.
    seed : int
        Seed of the views.
    view_indices : sequence of int, optional
        Indices of the views that the sequence contains. None: all.

    Attributes
    ----------
    n_views : int
        Number of views per image.
    """

    def __init__(
        self,
        images: ImageSequence,
        augmentation: str | Callable[[Image.Image], Image.Image],
        preprocessing: Preprocessing,
        *,
        n_views: int,
        seed: int,
        view_indices: Sequence[int] | None = None,
    ) -> None:
        self._images = images
        self._augmentation = augmentation
        self._preprocessing = preprocessing
        self.n_views = n_views
        self._seed = seed
        if view_indices is None:
            view_indices = range(len(images) * n_views)
        self._view_indices = view_indices

    def __len__(self) -> int:
        """Return the number of views."""
        return len(self._view_indices)

    def __getitem__(self, index: int) -> View:
        """Decode the image of a view, and return a function that computes the view.

        Raises
        ------
        ValueError
            If the image cannot be read; names its index, its path and the reason.
        """
        return self.decode_and_hash(index)[1]

    def decode_and_hash(self, index: int) -> tuple[bytes, View]:
        """Return the hash of a view as well, computed from the decoded content."""
        image_index, view_number = divmod(self._view_indices[index], self.n_views)
        image_hash, image = self._images.decode_and_hash(image_index)
        view_hash = self._view_hash(image_hash, view_number)
        # Created here, not in __init__, since its functions cannot be pickled.
        augmentation = augmentation_for(self._augmentation, self._preprocessing)
        transformed = augmentation.deterministic(image)

        def view() -> NDArray[np.uint8]:
            with temporary_seed(_CPU, *struct.unpack("<8I", view_hash)):
                return augmentation.random(transformed)

        return view_hash, view

    def subset(self, indices: Sequence[int]) -> "AugmentedViews":
        """Return a sequence of some of the views, without the images of the others."""
        chosen = [divmod(self._view_indices[i], self.n_views) for i in indices]
        image_indices = list(dict.fromkeys(image_index for image_index, _ in chosen))
        new_index = {image_index: i for i, image_index in enumerate(image_indices)}
        return self._with(
            self._images.subset(image_indices),
            [
                new_index[image_index] * self.n_views + view_number
                for image_index, view_number in chosen
            ],
        )

    def portable(self) -> "AugmentedViews":
        """Return a copy to pickle; see `ImageSequence.portable`."""
        return self._with(self._images.portable(), self._view_indices)

    def original_index(self, index: int) -> int | str:
        """Return the index in X, or the name, of the image of a view."""
        return self._images.original_index(self._view_indices[index] // self.n_views)

    def _with(
        self, images: ImageSequence, view_indices: Sequence[int]
    ) -> "AugmentedViews":
        return AugmentedViews(
            images,
            self._augmentation,
            self._preprocessing,
            n_views=self.n_views,
            seed=self._seed,
            view_indices=view_indices,
        )

    def content_hashes(self) -> list[bytes]:
        """Return the hashes of all views; see `ImageSequence.content_hashes`."""
        views = [divmod(view_index, self.n_views) for view_index in self._view_indices]
        image_indices = list(dict.fromkeys(image_index for image_index, _ in views))
        image_hashes = self._images.subset(image_indices).content_hashes()
        hash_of = dict(zip(image_indices, image_hashes, strict=True))
        return [
            self._view_hash(hash_of[image_index], view_number)
            for image_index, view_number in views
        ]

    def decode_fingerprint(self) -> dict[str, Any]:
        """Return the settings that, with the content, determine a view's pixels."""
        version = ".".join(torchvision.__version__.split(".")[:2])
        augmentation = f"{self._augmentation}, torchvision {version}"
        return {**self._images.decode_fingerprint(), "augmentation": augmentation}

    def _view_hash(self, image_hash: bytes, view_number: int) -> bytes:
        seed_and_view = struct.pack("<QQ", self._seed, view_number)
        return hashlib.sha256(image_hash + seed_and_view).digest()
