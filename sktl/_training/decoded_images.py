"""Decoded images that several training sets share.

Pixels that do not change between epochs are cached in memory if they are small enough.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._images.augmentation import Augmentation
from sktl._images.augmented_views import AugmentedViews
from sktl._images.sequence import ImageSequence

_MAX_CACHED_BYTES = 2**30  # of pixels


class DecodedImages:
    """Images after the deterministic transform of an augmentation.

    Parameters
    ----------
    images : ImageSequence or AugmentedViews
        The images.
    augmentation : Augmentation
        Applied to each image.
    image_size : int
        Side in pixels of the result.
    """

    def __init__(
        self,
        images: ImageSequence | AugmentedViews,
        augmentation: Augmentation,
        image_size: int,
    ) -> None:
        self._images = images
        self._augmentation = augmentation
        self._pixels: NDArray[np.uint8] | None = None
        self._is_cached = np.zeros(len(images), dtype=bool)
        shape = (len(images), image_size, image_size, 3)
        if (
            augmentation.deterministic_returns_pixels
            and np.prod(shape) <= _MAX_CACHED_BYTES
        ):
            self._pixels = np.empty(shape, dtype=np.uint8)

    def __getitem__(self, position: int) -> Any:
        """Decode an image, unless it is cached; threads may call it.

        Parameters
        ----------
        position : int
            Position of the image.

        Returns
        -------
        object
            Input of `augment`.

        Raises
        ------
        ValueError
            If the image cannot be read: names the row, the path and the reason.
        """
        transform: Callable[[Any], Any] = self._augmentation.deterministic
        if self._pixels is None:
            return transform(self._images[position])
        if not self._is_cached[position]:
            self._pixels[position] = transform(self._images[position])
            self._is_cached[position] = True
        return self._pixels[position]

    def augment(self, decoded: Any) -> NDArray[np.uint8]:
        """Return the pixels ``(side, side, 3)`` of a decoded image, augmented."""
        return self._augmentation.random(decoded)
