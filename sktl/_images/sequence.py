"""A sequence of images, decoded one at a time when they are asked for."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import PIL
from PIL import Image

from sktl._images.decode import PixelRange, as_array, decode
from sktl._images.hashing import content_hashes, decode_and_hash


class ImageSequence:
    """A sequence of RGB images, decoded one at a time when asked for.

    Nothing is kept and nothing shared is changed, so that threads may ask for several
    at once. Made by `validate_images`, which has checked the rows.

    Parameters
    ----------
    rows : sequence of length n_samples
        The images in the form the user gave them: anything with a length and
        positions.
    pixel_range : tuple of two floats or "auto"
        Values of black and white in arrays; see `sktl._images.decode.to_uint8`.
    row_shape : tuple of ints, optional
        Shape of an image whose row in `rows` is flat.
    numbers : sequence of int, optional
        What errors call the rows. None counts them from 0.
    min_decode_size : int, optional
        As in `decode`.
    """

    def __init__(
        self,
        rows: Any,
        pixel_range: PixelRange,
        row_shape: tuple[int, ...] | None = None,
        numbers: Sequence[int] | None = None,
        min_decode_size: int | None = None,
    ) -> None:
        self._rows = rows
        self._numbers = range(len(rows)) if numbers is None else numbers
        self._pixel_range = pixel_range
        self._row_shape = row_shape
        self._least_side = min_decode_size

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self._rows)

    def __getitem__(self, row: int) -> Image.Image:
        """Decode the image of one row.

        Returns
        -------
        PIL.Image.Image
            Upright, mode "RGB".

        Raises
        ------
        ValueError
            If it cannot be read: names the row, the path and the reason.
        """
        return decode(
            self._row(row),
            row=self._numbers[row],
            pixel_range=self._pixel_range,
            min_decode_size=self._least_side,
        )

    def subset(self, positions: Sequence[int]) -> "ImageSequence":
        """Give some of the images; in errors they keep their numbers."""
        rows = [self._rows[position] for position in positions]
        numbers = [self._numbers[position] for position in positions]
        return ImageSequence(
            rows, self._pixel_range, self._row_shape, numbers, self._least_side
        )

    def original_index(self, position: int) -> int:
        """Say what errors call the row at a position."""
        return self._numbers[position]

    def portable(self) -> "ImageSequence":
        """Give the same, to be pickled for a process with another working directory."""
        rows = [
            _for_elsewhere(row, number, self._pixel_range)
            for row, number in zip(self._rows, self._numbers, strict=True)
        ]
        return ImageSequence(
            rows, self._pixel_range, self._row_shape, self._numbers, self._least_side
        )

    def with_min_decode_size(self, min_decode_size: int | None) -> "ImageSequence":
        """Give the same, with another `min_decode_size`."""
        return ImageSequence(
            self._rows,
            self._pixel_range,
            self._row_shape,
            self._numbers,
            min_decode_size,
        )

    def decode_fingerprint(self) -> dict[str, str]:
        """Say what decides, beside the content of an image, what it looks like."""
        return {
            "pixel_range": str(self._pixel_range),
            "decoder": f"Pillow {PIL.__version__.split('.')[0]}",
            "min_decode_size": str(self._least_side),
        }

    def content_hashes(self) -> list[bytes]:
        """Give the keys of the content of all rows; see `sktl._images.hashing`."""
        rows: Iterable[Any] = self._rows
        if self._row_shape is not None:
            rows = map(self._row, range(len(self)))
        return content_hashes(rows, self._numbers, pixel_range=self._pixel_range)

    def decode_and_hash(self, row: int) -> tuple[bytes, Image.Image]:
        """Decode the image of one row, and give the key of just that content."""
        return decode_and_hash(
            self._row(row),
            row=self._numbers[row],
            pixel_range=self._pixel_range,
            min_decode_size=self._least_side,
        )

    def _row(self, row: int) -> Any:
        image = self._rows[row]
        if self._row_shape is not None:
            image = image.reshape(self._row_shape)  # (n_features,) -> (h, w[, c])
        return image


def _for_elsewhere(image: Any, number: int, pixel_range: PixelRange) -> Any:
    if isinstance(image, str | os.PathLike):
        return os.path.join(os.getcwd(), os.fsdecode(image))
    if isinstance(image, Image.Image):
        # Pillow leaves orientation, and transparency of palettes, behind.
        return decode(image, row=number, pixel_range=pixel_range)
    if isinstance(image, bytes):
        return image
    return as_array(image, f"X[{number}]")  # a tensor takes all that it is a view of
