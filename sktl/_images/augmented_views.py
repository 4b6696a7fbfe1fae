"""Fixed views of images: each varied some times, the same ways ever after.

What a view shows is drawn from a seed, the content of its image and its number, and
not from where the image stands. So the views of an image are the same in each epoch
and fold, and can be remembered as images are.
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

View = Callable[[], NDArray[np.uint8]]  # gives pixels (side, side, 3)

_CPU = torch.device("cpu")

# What is left to be done to a view, in the form of an `Augmentation`.
APPLY_VIEW = Augmentation(lambda view: view, lambda view: view(), False)


class AugmentedViews:
    """Some views of each of a sequence of images; itself such a sequence.

    View v of image i stands at ``i * n_views + v``. It is decoded when asked for, and
    given as a function that varies it: that draws from global random generators, which
    belong to one thread.

    Parameters
    ----------
    images : ImageSequence
        Of what.
    augmentation : str or callable
        How they are varied, as in `augmentation_for`.
    preprocessing : Preprocessing
        Size and interpolation.
    n_views : int
        How many views there are of each.
    seed : int
        Others, other views.
    positions : sequence of int, optional
        Which views these are. None: all.

    Attributes
    ----------
    n_views : int
        As given.
    """

    def __init__(
        self,
        images: ImageSequence,
        augmentation: str | Callable[[Image.Image], Image.Image],
        preprocessing: Preprocessing,
        *,
        n_views: int,
        seed: int,
        positions: Sequence[int] | None = None,
    ) -> None:
        self._images = images
        self._name = augmentation
        self._preprocessing = preprocessing
        self.n_views = n_views
        self._seed = seed
        if positions is None:
            positions = range(len(images) * n_views)
        self._positions = positions

    def __len__(self) -> int:
        """Give the number of views."""
        return len(self._positions)

    def __getitem__(self, position: int) -> View:
        """Decode the image of a view, and give a function that varies it.

        Raises
        ------
        ValueError
            If it cannot be read: names the row, the path and the reason.
        """
        return self.decode_and_hash(position)[1]

    def decode_and_hash(self, position: int) -> tuple[bytes, View]:
        """Do the same, and give the key of just that view."""
        row, number = divmod(self._positions[position], self.n_views)
        key, image = self._images.decode_and_hash(row)
        key = self._key(key, number)
        # Made here, not in __init__: its functions cannot be pickled.
        augmentation = augmentation_for(self._name, self._preprocessing)
        prepared = augmentation.deterministic(image)

        def view() -> NDArray[np.uint8]:
            with temporary_seed(_CPU, *struct.unpack("<8I", key)):
                return augmentation.random(prepared)

        return key, view

    def subset(self, positions: Sequence[int]) -> "AugmentedViews":
        """Give some of the views, which know of no other images."""
        places = [divmod(self._positions[i], self.n_views) for i in positions]
        rows = {row: i for i, row in enumerate(dict.fromkeys(row for row, _ in places))}
        return self._of(
            self._images.subset(list(rows)),
            [rows[row] * self.n_views + number for row, number in places],
        )

    def portable(self) -> "AugmentedViews":
        """Give the same; see `ImageSequence.portable`."""
        return self._of(self._images.portable(), self._positions)

    def original_index(self, position: int) -> int:
        """Say what errors call the row of a view."""
        return self._images.original_index(self._positions[position] // self.n_views)

    def _of(self, images: ImageSequence, positions: Sequence[int]) -> "AugmentedViews":
        return AugmentedViews(
            images,
            self._name,
            self._preprocessing,
            n_views=self.n_views,
            seed=self._seed,
            positions=positions,
        )

    def content_hashes(self) -> list[bytes]:
        """Give the keys of all views; see `ImageSequence.content_hashes`."""
        places = [divmod(position, self.n_views) for position in self._positions]
        rows = list(dict.fromkeys(row for row, _ in places))
        keys = dict(zip(rows, self._images.subset(rows).content_hashes(), strict=True))
        return [self._key(keys[row], number) for row, number in places]

    def decode_fingerprint(self) -> dict[str, Any]:
        """Return the settings that, with the content, determine a view's pixels."""
        version = ".".join(torchvision.__version__.split(".")[:2])
        varied = f"{self._name}, torchvision {version}"
        return {**self._images.decode_fingerprint(), "augmentation": varied}

    def _key(self, key: bytes, number: int) -> bytes:
        return hashlib.sha256(key + struct.pack("<QQ", self._seed, number)).digest()
