"""Data augmentation, by name or by a user-defined function.

An augmentation consists of a deterministic transform followed by a random one. The
deterministic transform (decoding, resizing) can run in threads, and its output can be
cached. The random transform runs in the training thread, one image after the other, and
draws from torch's global generator, as torchvision's transforms do; the result
therefore does not depend on the number of threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from sktl._images.preprocessing import MAX_SIZE, Preprocessing

AUGMENTATIONS = {"flip", "standard", "trivial"}

# Smaller crops of a photograph often do not show the labelled object.
_CROP_SCALE = (0.35, 1.0)  # fraction of the area
# Modes of 8 bits without alpha, which Pillow converts to RGB without loss.
_CONVERTIBLE_MODES = {"1", "L", "P", "RGB", "CMYK", "HSV", "YCbCr"}
_JITTER = 0.2  # brightness, contrast and saturation: 80 % to 120 %


@dataclass(frozen=True)
class Augmentation:
    """An augmentation as a deterministic and a random transform.

    Attributes
    ----------
    deterministic : callable
        Maps a PIL image in mode RGB to the input of `random`, always to the same.
    random : callable
        Maps the output of `deterministic` to pixels ``(side, side, 3)``, uint8, which
        differ from call to call.
    deterministic_returns_pixels : bool
        Whether `deterministic` returns pixels ``(side, side, 3)``, uint8, which can be
        cached.
    """

    deterministic: Callable[[Image.Image], Any]
    random: Callable[[Any], NDArray[np.uint8]]
    deterministic_returns_pixels: bool


def augmentation_for(
    augmentation: str | Callable[[Image.Image], Image.Image] | None,
    preprocessing: Preprocessing,
) -> Augmentation:
    """Return the transforms of an augmentation.

    Parameters
    ----------
    augmentation : {"flip", "standard", "trivial"}, callable or None
        ``"flip"``: horizontal flip with probability 0.5. ``"standard"``: random crop of
        35 to 100 % of the area instead of the center crop, flip, and color jitter.
        ``"trivial"``: the same crop and flip, and one transform drawn at random [1]_. A
        callable maps the whole image, a PIL image, to another one, which is then
        preprocessed. None: no augmentation.
    preprocessing : Preprocessing
        Size, interpolation and resize mode of the output. With the modes "squash" and
        "pad", random crops are taken from the squashed or padded image: crops of about
        equal width and height of a long image itself would never show both of its ends.

    Returns
    -------
    Augmentation
        Deterministic and random transform.

    References
    ----------
    .. [1] Müller, Hutter: *TrivialAugment: Tuning-free Yet State-of-the-Art Data
       Augmentation*, 2021.
    """
    if augmentation is None:
        return Augmentation(preprocessing, lambda pixels: pixels, True)
    if augmentation == "flip":
        return Augmentation(preprocessing, _random_flip, True)
    if callable(augmentation):

        def augment(image: Image.Image) -> NDArray[np.uint8]:
            output = augmentation(image)
            if not isinstance(output, Image.Image):
                raise TypeError(
                    "A callable 'augmentation' must return a PIL image. Got "
                    f"{type(output).__name__} from {augmentation!r}."
                )
            if output.mode not in _CONVERTIBLE_MODES:
                raise ValueError(
                    "A callable 'augmentation' must return an image of 8 bits without "
                    f"transparency. Got mode {output.mode!r} from {augmentation!r}. "
                    "Convert it to 'RGB'."
                )
            return preprocessing(output.convert("RGB"))

        return Augmentation(_load, augment, False)
    color_transform = (
        transforms.ColorJitter(_JITTER, _JITTER, _JITTER)
        if augmentation == "standard"
        else transforms.TrivialAugmentWide()
    )
    transform = transforms.Compose(
        [
            _random_resized_crop(preprocessing),
            transforms.RandomHorizontalFlip(),
            color_transform,
        ]
    )
    return Augmentation(
        partial(_load_to_crop, preprocessing=preprocessing),
        lambda image: np.array(transform(image), dtype=np.uint8),
        False,
    )


def _random_resized_crop(
    preprocessing: Preprocessing,
) -> Callable[[Image.Image], Image.Image]:
    """Return torchvision's random crop, for images of any size."""
    crop = transforms.RandomResizedCrop(
        preprocessing.crop_size,
        _CROP_SCALE,
        interpolation=InterpolationMode(preprocessing.interpolation),
    )

    def crop_and_resize(image: Image.Image) -> Image.Image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is None or image.width * image.height <= limit:
            return crop(image)
        # Not Image.crop, which refuses crops above the global limit of Pillow. This
        # transform selects the same pixels.
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        box = (left, top, left + width, top + height)
        image = image.transform((width, height), Image.Transform.EXTENT, box)
        return tvf.resize(image, crop.size, crop.interpolation)

    return crop_and_resize


def _load(image: Image.Image) -> Image.Image:
    image.load()  # otherwise Pillow may decode lazily, in the training thread
    return image


def _load_to_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Return the image of which random crops are taken."""
    if preprocessing.resize == "crop":
        return _load(image)
    # Of twice the size of the output, so that no crop is enlarged: with 35 % of the
    # area and an aspect ratio of 3/4, it has 51 % of the width.
    side = min(2 * preprocessing.crop_size, MAX_SIZE)
    return Image.fromarray(preprocessing.with_image_size(side)(image))


def _random_flip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels  # (side, side, 3)
