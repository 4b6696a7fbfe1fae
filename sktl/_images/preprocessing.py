"""What is done to an image between decoding it and showing it to a network."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

# Longer images are cropped while they are resized, not after: at a shorter side of
# 256, one of 1 x 20000 pixels would become 4 GB.
_LONGEST = 32
# Side in pixels; a square of it is larger than any image that is read from a file.
_LARGEST = 10_000


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a network sees it.

    Parameters
    ----------
    resize_size : int
        Length in pixels to which the shorter side is resized.

    crop_size : int
        Side in pixels of the square that is then cut out of the middle.

    interpolation : str, default="bilinear"
        A value of ``torchvision.transforms.InterpolationMode``, such as ``"bicubic"``.

    mean, std : tuple of 3 float, default=those of ImageNet
        Of red, green and blue on a scale from 0 to 1; the mean is subtracted and the
        result divided by the deviation. Calling a `Preprocessing` leaves this to
        whoever has the pixels in floating point.

    Raises
    ------
    ValueError
        If a size is below 1 or above 10000, the interpolation is unknown, or mean and
        std are not three finite numbers each, of which those of std are positive.
    """

    resize_size: int
    crop_size: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("resize_size", "crop_size"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(
                    f"{name} must be at least 1 and at most {_LARGEST}. Got {self!r}."
                )
        modes = [mode.value for mode in InterpolationMode]
        if self.interpolation not in modes:
            raise ValueError(f"interpolation must be one of {modes}. Got {self!r}.")
        # Python's own, so that it looks the same wherever it is written down.
        for name in ("resize_size", "crop_size"):
            object.__setattr__(self, name, int(getattr(self, name)))
        # Tuples, so that it can be hashed and compared however it was written.
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if (
            len(self.mean) != 3
            or len(self.std) != 3
            or min(self.std) <= 0
            or not all(map(math.isfinite, self.mean + self.std))
        ):
            raise ValueError(
                "mean and std must have one number for each of red, green and blue, "
                f"all finite and those of std positive. Got {self!r}."
            )

    @classmethod
    def from_torchvision(cls, preset: Any) -> Self:
        """Read the transform of torchvision's classification weights.

        Parameters
        ----------
        preset : torchvision's ImageClassification
            As ``weights.transforms()`` gives it.

        Returns
        -------
        Preprocessing
            Which does the same.

        Raises
        ------
        TypeError
            If it is anything else.
        """
        if not hasattr(preset, "resize_size") or not hasattr(preset, "crop_size"):
            raise TypeError(
                "preprocessing must be a sktl.Preprocessing or the transforms() of "
                f"classification weights of torchvision. Got {preset!r}."
            )
        return cls(
            preset.resize_size[0],
            preset.crop_size[0],
            preset.interpolation.value,
            tuple(preset.mean),
            tuple(preset.std),
        )

    def with_image_size(self, side: int) -> Self:
        """Give the same for another size.

        Parameters
        ----------
        side : int
            Side in pixels to resize and crop to.

        Returns
        -------
        Preprocessing
            A new one.
        """
        return replace(self, resize_size=side, crop_size=side)

    def min_decode_size(self, reducing_gap: float | None) -> int | None:
        """Say how large an image must at least be decoded.

        Parameters
        ----------
        reducing_gap : float or None
            How many times the size it is resized to; None for as large as it is.

        Returns
        -------
        int or None
            Of the shorter side, in pixels.
        """
        if reducing_gap is None:
            return None
        return math.ceil(reducing_gap * self.resize_size)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize an image and cut out its middle.

        Parameters
        ----------
        image : PIL.Image.Image
            In mode RGB, of any size.

        Returns
        -------
        ndarray of shape (crop_size, crop_size, 3), uint8
            The pixels that torchvision's transform gives; of an image more than 32
            times as long as wide, up to the rounding of intermediate results. Where
            the crop is larger than the resized image, it is black around it.
        """
        mode = InterpolationMode(self.interpolation)
        if max(image.size) <= _LONGEST * min(image.size):
            image = tvf.resize(image, [self.resize_size], mode)
        else:
            image = self._resized_middle(image)
        return np.array(tvf.center_crop(image, [self.crop_size]), dtype=np.uint8)

    def _resized_middle(self, image: Image.Image) -> Image.Image:
        # Along the longer side only those pixels that the crop will keep.
        short, long = sorted(image.size)
        new_long = int(self.resize_size * long / short)
        kept = min(self.crop_size, new_long)
        start = round((new_long - kept) / 2)
        scale = long / new_long
        first, last = start * scale, (start + kept) * scale
        # What the widest filter (Lanczos, 3 pixels) sees of the image. Cut out
        # before, since Pillow keeps the corners of a box in single precision.
        seen = 3 * max(1.0, scale) + 1
        low, high = max(0, int(first - seen)), min(long, math.ceil(last + seen))
        resample = tvf.pil_modes_mapping[InterpolationMode(self.interpolation)]
        corners = (first - low, 0.0, last - low, float(short))
        if image.height <= image.width:
            part = image.crop((low, 0, high, short))
            return part.resize((kept, self.resize_size), resample, box=corners)
        part = image.crop((0, low, short, high))
        left, top, right, bottom = corners
        turned = (top, left, bottom, right)
        return part.resize((self.resize_size, kept), resample, box=turned)


class Normalization(nn.Module):
    """The rest of a `Preprocessing`, for whole batches of what it gives.

    Step by step as torchvision does it, so that the bits are the same, but over rows of
    pixels instead of channels: the innermost axis is then hundreds long, not three.

    Parameters
    ----------
    preprocessing : Preprocessing
        Whose mean and deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            channels = torch.tensor(getattr(preprocessing, name))
            row = channels.repeat(preprocessing.crop_size)  # (3,) -> (side * 3,)
            self.register_buffer(name, row, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn uint8 ``(n, side, side, 3)`` into float32 ``(n, 3, side, side)``."""
        rows = pixels.flatten(2)  # (n, side, side * 3)
        # Nothing in place: OpenVINO does not read that.
        x: Tensor = (rows / 255 - self.mean) / self.std
        return x.view(pixels.shape).permute(0, 3, 1, 2)  # channels last in memory
