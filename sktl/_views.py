"""Fixed views of pictures: each varied some times, the same ways ever after.

What a view shows is drawn from a seed, the content of its picture and its number, and
not from where the picture stands. So the views of a picture are the same in each epoch
and fold, and can be remembered as pictures are.
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

from sktl._augmentation import Augmentation, augmentation_for
from sktl._images import Pictures
from sktl._preprocessing import Preprocessing
from sktl._random_state import seeded

View = Callable[[], NDArray[np.uint8]]  # gives pixels (side, side, 3)

_CPU = torch.device("cpu")

# What is left to be done to a view, in the form of an `Augmentation`.
AS_SEEN = Augmentation(lambda view: view, lambda view: view(), False)


class Views:
    """Some views of each of a sequence of pictures; itself such a sequence.

    View v of picture i stands at ``i * n_views + v``. It is decoded when asked for, and
    given as a function that varies it: that draws from global random generators, which
    belong to one thread.

    Parameters
    ----------
    pictures : Pictures
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
        pictures: Pictures,
        augmentation: str | Callable[[Image.Image], Image.Image],
        preprocessing: Preprocessing,
        *,
        n_views: int,
        seed: int,
        positions: Sequence[int] | None = None,
    ) -> None:
        self._pictures = pictures
        self._name = augmentation
        self._preprocessing = preprocessing
        self.n_views = n_views
        self._seed = seed
        if positions is None:
            positions = range(len(pictures) * n_views)
        self._positions = positions

    def __len__(self) -> int:
        """Give the number of views."""
        return len(self._positions)

    def __getitem__(self, position: int) -> View:
        """Decode the picture of a view, and give a function that varies it.

        Raises
        ------
        ValueError
            If it cannot be read: names the row, the path and the reason.
        """
        return self.keyed(position)[1]

    def keyed(self, position: int) -> tuple[bytes, View]:
        """Do the same, and give the key of just that view."""
        row, number = divmod(self._positions[position], self.n_views)
        key, picture = self._pictures.keyed(row)
        key = self._key(key, number)
        # Made here, not in __init__: its functions cannot be pickled.
        augmentation = augmentation_for(self._name, self._preprocessing)
        prepared = augmentation.prepare(picture)

        def view() -> NDArray[np.uint8]:
            with seeded(_CPU, *struct.unpack("<8I", key)):
                return augmentation.vary(prepared)

        return key, view

    def at(self, positions: Sequence[int]) -> "Views":
        """Give some of the views, which know of no other pictures."""
        places = [divmod(self._positions[i], self.n_views) for i in positions]
        rows = {row: i for i, row in enumerate(dict.fromkeys(row for row, _ in places))}
        return self._of(
            self._pictures.at(list(rows)),
            [rows[row] * self.n_views + number for row, number in places],
        )

    def elsewhere(self) -> "Views":
        """Give the same; see `Pictures.elsewhere`."""
        return self._of(self._pictures.elsewhere(), self._positions)

    def number(self, position: int) -> int:
        """Say what errors call the row of a view."""
        return self._pictures.number(self._positions[position] // self.n_views)

    def _of(self, pictures: Pictures, positions: Sequence[int]) -> "Views":
        return Views(
            pictures,
            self._name,
            self._preprocessing,
            n_views=self.n_views,
            seed=self._seed,
            positions=positions,
        )

    def keys(self) -> list[bytes]:
        """Give the keys of all views; see `Pictures.keys`."""
        places = [divmod(position, self.n_views) for position in self._positions]
        rows = list(dict.fromkeys(row for row, _ in places))
        keys = dict(zip(rows, self._pictures.at(rows).keys(), strict=True))
        return [self._key(keys[row], number) for row, number in places]

    def decoder(self) -> dict[str, Any]:
        """Say what else decides what a view looks like; see `Pictures.decoder`."""
        version = ".".join(torchvision.__version__.split(".")[:2])
        varied = f"{self._name}, torchvision {version}"
        return {**self._pictures.decoder(), "augmentation": varied}

    def _key(self, key: bytes, number: int) -> bytes:
        return hashlib.sha256(key + struct.pack("<QQ", self._seed, number)).digest()
