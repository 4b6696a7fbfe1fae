"""A sequence of images that are decoded on access."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import PIL
from PIL import Image

from sktl._images.decode import as_array, decode, row_name
from sktl._images.file_formats import FileOptions
from sktl._images.flattened import unflatten
from sktl._images.hashing import content_hashes, decode_and_hash
from sktl._images.pixel_values import PixelRange, WarnOnce

_DEFAULT_OPTIONS = FileOptions()

#: Version of the decoder, part of the key of cached rows. To be increased by any change
#: of the pixels that are decoded from the same content.
DECODER_VERSION = 3


class ImageSequence:
    """Lazy sequence of RGB images, each decoded when it is accessed.

    Decoded images are not cached and no shared state is modified, so that threads can
    access images concurrently. Created by `validate_images`, which checks the images.

    Parameters
    ----------
    images : sequence of length n_samples
        Images in the form the user passed them; any object with a length that can be
        indexed.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; see `decode`.
    image_shape : tuple of ints, optional
        Shape of the images if they are flattened, from `infer_flattened_shape`.
    original_indices : sequence of int or str, optional
        Index in X of each image, or its name, for error messages. None counts from 0.
    min_decode_size : int, optional
        As in `decode`.
    file_options : FileOptions, optional
        As in `decode`.
    warn : WarnOnce, optional
        As in `decode`; shared by all sequences of the same call.
    """

    def __init__(
        self,
        images: Any,
        pixel_range: PixelRange,
        image_shape: tuple[int, ...] | None = None,
        original_indices: Sequence[int | str] | None = None,
        min_decode_size: int | None = None,
        file_options: FileOptions = _DEFAULT_OPTIONS,
        warn: WarnOnce | None = None,
    ) -> None:
        self._images = images
        self._pixel_range = pixel_range
        self._image_shape = image_shape
        if original_indices is None:
            original_indices = range(len(images))
        self._original_indices = original_indices
        self._min_decode_size = min_decode_size
        self._file_options = file_options
        self._warn = warn or WarnOnce()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        """Decode one image.

        Returns
        -------
        PIL.Image.Image
            Upright image in mode "RGB".

        Raises
        ------
        ValueError
            If it cannot be read; names its index in X, its path and the reason.
        """
        return decode(
            self._image(index),
            index=self._original_indices[index],
            pixel_range=self._pixel_range,
            min_decode_size=self._min_decode_size,
            file_options=self._file_options,
            warn=self._warn,
        )

    def subset(self, indices: Sequence[int]) -> "ImageSequence":
        """Return a sequence of some of the images, with their original indices."""
        return ImageSequence(
            [self._images[index] for index in indices],
            self._pixel_range,
            self._image_shape,
            [self._original_indices[index] for index in indices],
            self._min_decode_size,
            self._file_options,
            self._warn,
        )

    def concatenate(self, other: "ImageSequence", name: str) -> "ImageSequence":
        """Return a sequence of these images and those of another sequence.

        Parameters
        ----------
        other : ImageSequence
            Created with the same settings; its images may have another form.
        name : str
            Name of the other X, such as ``"X_val"``, for error messages.
        """
        indices = (f"{name}[{index}]" for index in other._original_indices)
        return ImageSequence(
            [part._image(i) for part in (self, other) for i in range(len(part))],
            self._pixel_range,
            None,
            [*self._original_indices, *indices],
            self._min_decode_size,
            self._file_options,
            self._warn,
        )

    def original_index(self, index: int) -> int | str:
        """Return the index in X of an image, or its name."""
        return self._original_indices[index]

    def portable(self) -> "ImageSequence":
        """Return a copy to pickle for a process with another working directory."""
        images = [
            _portable_image(image, original_index, self._pixel_range)
            for image, original_index in zip(
                self._images, self._original_indices, strict=True
            )
        ]
        return ImageSequence(
            images,
            self._pixel_range,
            self._image_shape,
            self._original_indices,
            self._min_decode_size,
            self._file_options,
            self._warn,
        )

    def with_min_decode_size(self, min_decode_size: int | None) -> "ImageSequence":
        """Return the same images with another `min_decode_size`."""
        return ImageSequence(
            self._images,
            self._pixel_range,
            self._image_shape,
            self._original_indices,
            min_decode_size,
            self._file_options,
            self._warn,
        )

    def decode_fingerprint(self) -> dict[str, str]:
        """Return the settings that, with the content, determine the decoded pixels."""
        return {
            "pixel_range": str(self._pixel_range),
            "decoder": f"{DECODER_VERSION}, Pillow {PIL.__version__.split('.')[0]}",
            "min_decode_size": str(self._min_decode_size),
        }

    def content_hashes(self) -> list[bytes]:
        """Return the content hashes of all images; see `sktl._images.hashing`."""
        images: Iterable[Any] = self._images
        if self._image_shape is not None:
            images = map(self._image, range(len(self)))
        return content_hashes(
            images, self._original_indices, pixel_range=self._pixel_range
        )

    def decode_and_hash(self, index: int) -> tuple[bytes, Image.Image]:
        """Decode one image, and return the hash of exactly that content as well."""
        return decode_and_hash(
            self._image(index),
            index=self._original_indices[index],
            pixel_range=self._pixel_range,
            min_decode_size=self._min_decode_size,
            file_options=self._file_options,
            warn=self._warn,
        )

    def _image(self, index: int) -> Any:
        image = self._images[index]
        if self._image_shape is not None:
            image = unflatten(image, self._image_shape)  # (n_features,) -> (h, w[, c])
        return image


def _portable_image(
    image: Any, original_index: int | str, pixel_range: PixelRange
) -> Any:
    """Convert an image to a form that can be pickled without loss, and is small."""
    if isinstance(image, str | os.PathLike):
        return os.path.join(os.getcwd(), os.fsdecode(image))
    if isinstance(image, Image.Image):
        # Pickling loses the orientation, and the transparency of palettes.
        return decode(image, index=original_index, pixel_range=pixel_range)
    if isinstance(image, bytes):
        return image
    # As an array: pickling a tensor includes the whole tensor of which it is a view.
    return as_array(image, row_name(original_index))
