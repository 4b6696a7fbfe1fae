"""How an image is varied in training, by name or by a function of the user's.

Every variation has two halves. What is the same each time (decoding, resizing) may be
done in threads, and kept. What is random runs in the thread that trains, one image
after the other, and draws from torch's global generator, as torchvision's transforms
do; so the same seed gives the same images, however many threads there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from sktl._images.preprocessing import Preprocessing

NAMES = {"flip", "standard", "trivial"}

# Less of a photograph than a third often shows nothing of what its label names.
_CROP_AREA = (0.35, 1.0)
# Those that Pillow converts to RGB without losing anything.
_PLAIN_MODES = {"1", "L", "P", "RGB", "CMYK", "HSV", "YCbCr"}
_COLOUR = 0.2  # brightness, contrast and saturation: 80 % to 120 %


@dataclass(frozen=True)
class Augmentation:
    """A variation in two halves.

    Attributes
    ----------
    deterministic : callable
        From a PIL image, mode RGB, to what `random` takes: always the same.
    random : callable
        From that to pixels ``(side, side, 3)``, uint8: another time, others.
    deterministic_gives_pixels : bool
        Whether `deterministic` gives pixels ``(side, side, 3)``, uint8, worth keeping.
    """

    deterministic: Callable[[Image.Image], Any]
    random: Callable[[Any], NDArray[np.uint8]]
    deterministic_gives_pixels: bool


def augmentation_for(
    augmentation: str | Callable[[Image.Image], Image.Image] | None,
    preprocessing: Preprocessing,
) -> Augmentation:
    """Give the augmentation of that name for images that are preprocessed like that.

    Parameters
    ----------
    augmentation : {"flip", "standard", "trivial"}, callable or None
        ``"flip"``: left and right exchanged in half of the cases. ``"standard"``: a
        crop of 35 to 100 % of the area instead of the middle, flip, and changes of
        colour. ``"trivial"``: that crop, flip, and one change drawn at random [1]_. A
        callable gets the whole image, a PIL image, and gives another, which is then
        preprocessed. None varies nothing.
    preprocessing : Preprocessing
        Size and interpolation.

    Returns
    -------
    Augmentation
        In two halves.

    References
    ----------
    .. [1] Müller, Hutter: *TrivialAugment: Tuning-free Yet State-of-the-Art Data
       Augmentation*, 2021.
    """
    if augmentation is None:
        return Augmentation(preprocessing, lambda pixels: pixels, True)
    if augmentation == "flip":
        return Augmentation(preprocessing, _flipped, True)
    if callable(augmentation):

        def varied(image: Image.Image) -> NDArray[np.uint8]:
            other = augmentation(image)
            if not isinstance(other, Image.Image):
                raise TypeError(
                    "A callable 'augmentation' must turn a PIL image into a PIL image. "
                    f"Got {type(other).__name__} from {augmentation!r}."
                )
            if other.mode not in _PLAIN_MODES:
                raise ValueError(
                    "A callable 'augmentation' must give an image of 8 bits without "
                    f"transparency. Got one of mode {other.mode!r} from "
                    f"{augmentation!r}. Convert it to 'RGB'."
                )
            return preprocessing(other.convert("RGB"))

        return Augmentation(_whole, varied, False)
    last = (
        transforms.ColorJitter(_COLOUR, _COLOUR, _COLOUR)
        if augmentation == "standard"
        else transforms.TrivialAugmentWide()
    )
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocessing.crop_size,
                _CROP_AREA,
                interpolation=InterpolationMode(preprocessing.interpolation),
            ),
            transforms.RandomHorizontalFlip(),
            last,
        ]
    )
    return Augmentation(
        _whole, lambda image: np.array(chain(image), dtype=np.uint8), False
    )


def _whole(image: Image.Image) -> Image.Image:
    image.load()  # Pillow may put it off, and then the training thread would decode
    return image


def _flipped(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels  # (side, side, 3)
