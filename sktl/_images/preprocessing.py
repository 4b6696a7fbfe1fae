"""Preprocessing of decoded images: resize, center crop and normalization."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

# Images with a larger aspect ratio are resized and cropped in one step: resized to a
# shorter side of 256, an image of 1 x 20000 pixels would take 4 GB.
_MAX_ASPECT_RATIO = 32
#: In pixels; a square of this size is larger than any image that is read from a file.
MAX_SIZE = 10_000
#: How an image of any aspect ratio becomes square.
RESIZE_MODES = ("crop", "squash", "pad")
_TWO_STEP_MODES = ("squash+crop", "pad+crop")  # to resize_size, then to crop_size
# Crop modes of timm. With "pad" the shorter side may be rounded to another pixel.
_TIMM_MODES = {"center": "crop", "squash": "squash+crop", "border": "pad+crop"}


@dataclass(frozen=True, repr=False)
class Preprocessing:
    """Preprocessing of images for a network: resize, center crop and normalize.

    Parameters
    ----------
    resize_size : int
        Size in pixels to which an image is resized before the center crop, if `resize`
        has one; with ``"squash"`` and ``"pad"`` it is not used.

    crop_size : int
        Side in pixels of the square that the network gets.

    interpolation : str, default="bilinear"
        Value of ``torchvision.transforms.InterpolationMode``, such as ``"bicubic"``.

    mean, std : tuple of 3 or 1 float, default=those of ImageNet
        Mean and standard deviation of the red, green and blue channel, for pixels
        scaled to [0, 1]. The mean is subtracted and the result divided by the standard
        deviation. With one number each, images are converted to grey by Pillow before
        they are resized, and the network gets one channel. Calling a `Preprocessing`
        does not normalize: it returns uint8 pixels, which are normalized together with
        the forward pass.

    resize : {"crop", "squash", "pad", "squash+crop", "pad+crop"}, default="crop"
        How an image becomes square. ``"crop"``: resize its shorter side to
        `resize_size` and crop the center, as torchvision does. ``"squash"``: resize it
        to the square, whatever its aspect ratio. ``"pad"``: resize its longer side to
        `crop_size` and fill the rest with `mean`, rounded to 8 bits, which is 0 after
        normalization, up to this rounding. ``"squash+crop"`` and ``"pad+crop"``: resize
        it to a square of `resize_size`, or its longer side to `resize_size`, and crop
        or pad the center to `crop_size`, as timm does.

    Raises
    ------
    ValueError
        If a size is below 1 or above 10000, the interpolation or `resize` is unknown,
        or mean and std are not three finite numbers each, or one, with positive std.
    """

    resize_size: int
    crop_size: int
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: str = "crop"

    def __post_init__(self) -> None:
        for name in ("resize_size", "crop_size"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise ValueError(
                    f"{name} must be at least 1 and at most {MAX_SIZE}. Got {self!r}."
                )
        modes = [mode.value for mode in InterpolationMode]
        if self.interpolation not in modes:
            raise ValueError(f"interpolation must be one of {modes}. Got {self!r}.")
        if self.resize not in RESIZE_MODES + _TWO_STEP_MODES:
            raise ValueError(
                f"resize must be one of {[*RESIZE_MODES, *_TWO_STEP_MODES]}. Got "
                f"{self!r}."
            )
        # Python's types, so that the repr does not depend on the type of the input.
        for name in ("resize_size", "crop_size"):
            object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "resize", str(self.resize))
        # Tuples of floats, which are hashable and compare equal to other sequences.
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if (
            len(self.mean) not in (1, 3)
            or len(self.std) != len(self.mean)
            or min(self.std) <= 0
            or not all(map(math.isfinite, self.mean + self.std))
        ):
            raise ValueError(
                "mean and std must have one finite number for each of red, green and "
                "blue, or both have one for grey images, and std must be positive. Got "
                f"{self!r}."
            )

    def __repr__(self) -> str:
        """Return the fields; it is a part of cache keys.

        `resize` is left out if it is "crop", so that the rows that were cached before
        the field existed are found.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.resize == "crop":
            del values["resize"]
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{type(self).__name__}({arguments})"

    @property
    def n_channels(self) -> int:
        """Number of channels that the network gets: 3, or 1 for grey images."""
        return len(self.mean)

    @classmethod
    def from_torchvision(cls, preset: Any) -> Self:
        """Create a preprocessing from the transforms of torchvision weights.

        Parameters
        ----------
        preset : torchvision's ImageClassification
            Transforms of classification weights, ``weights.transforms()``.

        Returns
        -------
        Preprocessing
            Equivalent preprocessing.

        Raises
        ------
        TypeError
            If `preset` is of another type.
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

    @classmethod
    def from_timm(cls, cfg: Any) -> Self:
        """Create a preprocessing from the configuration of weights of timm.

        Parameters
        ----------
        cfg : mapping or PretrainedCfg of timm
            ``model.pretrained_cfg``, or the output of
            ``timm.data.resolve_model_data_config(model)``, or the ``pretrained_cfg`` of
            the file ``config.json`` of a model hub. For missing values, the defaults of
            timm are used.

        Returns
        -------
        Preprocessing
            Equivalent to ``timm.data.create_transform`` for evaluation.

        Raises
        ------
        TypeError
            If `cfg` is of another type.
        ValueError
            If `cfg` has no ``input_size``, or one that is not square or has neither 1
            nor 3 channels, or another value is unsupported.
        """
        if is_dataclass(cfg) and not isinstance(cfg, type):
            cfg = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
        if not isinstance(cfg, Mapping):
            raise TypeError(
                "cfg must be a pretrained_cfg of timm. Got an object of type "
                f"{type(cfg).__name__}. Pass model.pretrained_cfg."
            )
        size = tuple(cfg.get("input_size") or ())
        if len(size) != 3 or size[1] != size[2] or size[0] not in (1, 3):
            raise ValueError(
                "The input_size in cfg must be (channels, side, side), with 1 or 3 "
                "channels, since images are made square. Got "
                f"{cfg.get('input_size')!r}. Pass a copy of cfg with a square "
                "input_size, if the network supports it."
            )
        crop_mode = cfg.get("crop_mode") or "center"
        if crop_mode not in _TIMM_MODES:
            raise ValueError(
                f"The crop_mode in cfg must be one of {list(_TIMM_MODES)}. Got "
                f"{crop_mode!r}."
            )
        resize_size = math.floor(size[1] / (cfg.get("crop_pct") or 0.875))
        mean, std = (tuple(cfg.get(n) or getattr(cls, n)) for n in ("mean", "std"))
        if len(mean) != size[0] or len(std) != size[0]:
            raise ValueError(
                "mean and std in cfg must have one number for each channel of "
                f"input_size={size}. Got mean={mean} and std={std}."
            )
        resize = _TIMM_MODES[crop_mode]
        if resize == "squash+crop" and resize_size == size[1]:
            resize = "squash"  # the same pixels
        return cls(
            resize_size,
            size[1],
            cfg.get("interpolation") or "bicubic",
            mean,
            std,
            resize,
        )

    def with_image_size(self, side: int) -> Self:
        """Return the same preprocessing for another image size.

        Parameters
        ----------
        side : int
            Side in pixels to resize and crop to.

        Returns
        -------
        Preprocessing
            New preprocessing with ``resize_size`` and ``crop_size`` equal to `side`.
        """
        return replace(self, resize_size=side, crop_size=side)

    def min_decode_size(self, reducing_gap: float | None) -> int | None:
        """Return the minimum size at which images must be decoded.

        Parameters
        ----------
        reducing_gap : float or None
            Minimum ratio of the decoded size to the size after resizing. None: images
            are decoded at full size.

        Returns
        -------
        int or None
            Minimum size of the shorter side, in pixels.
        """
        if reducing_gap is None:
            return None
        # If it is padded, the shorter side becomes smaller still: a safe bound.
        is_one_step = self.resize in ("squash", "pad")
        size = self.crop_size if is_one_step else self.resize_size
        return math.ceil(reducing_gap * size)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Make an image square, of the size that the network gets.

        Parameters
        ----------
        image : PIL.Image.Image
            Image of any size in mode RGB.

        Returns
        -------
        ndarray of shape (crop_size, crop_size, 3), uint8
            The same pixels as those of torchvision's transforms; for aspect ratios
            above 32, up to rounding of intermediate results. A crop larger than the
            resized image is padded with black, or as `resize` says. If the network
            gets one channel, all three have its values.
        """
        if self.n_channels == 1:
            image = image.convert("L").convert("RGB")
        if self.resize != "crop":
            return self._resize_whole(image)
        mode = InterpolationMode(self.interpolation)
        if max(image.size) <= _MAX_ASPECT_RATIO * min(image.size):
            image = tvf.resize(image, [self.resize_size], mode)
        else:
            image = self._resize_center(image)
        return np.array(tvf.center_crop(image, [self.crop_size]), dtype=np.uint8)

    def _resize_whole(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize a whole image, then crop or pad it to the square."""
        side, mode = self.crop_size, InterpolationMode(self.interpolation)
        longest, color = max(image.size), self._mean_color()
        if self.resize == "pad":
            width, height = (max(1, round(side * n / longest)) for n in image.size)
        elif self.resize == "pad+crop":  # divided in the order in which timm does
            scale = longest / self.resize_size
            width, height = (max(1, round(n / scale)) for n in image.size)
        else:
            color = (0, 0, 0)
            width = height = side if self.resize == "squash" else self.resize_size
        if image.height > _MAX_ASPECT_RATIO * image.width:
            # Pillow resizes rows first: one of 1 x 80 million pixels would take 70 GB.
            image = tvf.resize(image, [height, image.width], mode)
        resized = tvf.resize(image, [height, width], mode)  # unchanged if it fits
        square = Image.new("RGB", (side, side), color)
        square.paste(
            resized, (_center_offset(width, side), _center_offset(height, side))
        )
        return np.array(square, dtype=np.uint8)

    def _mean_color(self) -> tuple[int, ...]:
        """Return the mean as a pixel, clipped to the values that a pixel can have."""
        color = tuple(min(max(round(255 * value), 0), 255) for value in self.mean)
        return color if self.n_channels == 3 else color * 3

    def _resize_center(self, image: Image.Image) -> Image.Image:
        """Resize only the part of an image that the center crop keeps."""
        short, long = sorted(image.size)
        new_long = int(self.resize_size * long / short)
        kept = min(self.crop_size, new_long)
        start = round((new_long - kept) / 2)
        scale = long / new_long
        first, last = start * scale, (start + kept) * scale
        # Crop to the support of the widest filter (Lanczos, 3 pixels) first, since
        # Pillow stores the corners of a box in single precision.
        support = 3 * max(1.0, scale) + 1
        low, high = max(0, int(first - support)), min(long, math.ceil(last + support))
        resample = tvf.pil_modes_mapping[InterpolationMode(self.interpolation)]
        corners = (first - low, 0.0, last - low, float(short))
        if image.height <= image.width:
            part = image.crop((low, 0, high, short))
            return part.resize((kept, self.resize_size), resample, box=corners)
        part = image.crop((0, low, short, high))
        left, top, right, bottom = corners
        transposed = (top, left, bottom, right)
        return part.resize((self.resize_size, kept), resample, box=transposed)


def _center_offset(size: int, side: int) -> int:
    """Return the offset of a centered crop or padding, as torchvision rounds it."""
    return (side - size) // 2 if size <= side else -round((size - side) / 2)


class Normalization(nn.Module):
    """Normalize batches of uint8 pixels by the mean and std of a `Preprocessing`.

    Applies the same operations as torchvision, so that the results are bit-identical,
    but to rows of pixels: the innermost axis then has hundreds of elements instead of
    three, which is faster.

    Parameters
    ----------
    preprocessing : Preprocessing
        Preprocessing with the mean and std.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            channels = torch.tensor(getattr(preprocessing, name), dtype=torch.float32)
            row = channels.repeat(preprocessing.crop_size)  # (c,) -> (side * c,)
            self.register_buffer(name, row, persistent=False)
        self._is_grey = preprocessing.n_channels == 1

    def forward(self, pixels: Tensor) -> Tensor:
        """Convert uint8 ``(n, side, side, 3)`` to float32 ``(n, c, side, side)``.

        For one channel, pixels that are not grey, as augmentations return, are
        converted as Pillow does; those that are grey keep their values.
        """
        if self._is_grey:
            red, green, blue = pixels.int().unbind(3)
            luminance = 19595 * red + 38470 * green + 7471 * blue  # in units of 2**-16
            pixels = ((luminance + 2**15) // 2**16).unsqueeze(3)
        rows = pixels.flatten(2)  # (n, side, side * c)
        if torch.get_default_dtype() != torch.float32:  # that of a quotient of integers
            rows = rows.float()
        # Not in place: OpenVINO does not support in-place operations.
        x: Tensor = (rows / 255 - self.mean) / self.std
        return x.view(pixels.shape).permute(0, 3, 1, 2)  # channels last in memory
