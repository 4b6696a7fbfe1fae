"""Values of black and white in arrays, and scaling of pixels to uint8.

==========================  ====================================================
dtype                       values of black and white
==========================  ====================================================
booleans                    False and True, whatever ``pixel_range`` is
integers                    ``pixel_range``; "auto": smallest and largest value of
                            the dtype
floats                      ``pixel_range``; "auto": 0 and 1
==========================  ====================================================
"""

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

PixelRange = tuple[float, float] | Literal["auto"]


def resolve_pixel_range(
    dtype: np.dtype[Any], pixel_range: PixelRange
) -> tuple[float, float]:
    """Return the values of black and white in arrays of a dtype.

    Parameters
    ----------
    dtype : numpy.dtype
        Dtype of booleans, integers or floats.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; see the table at the top of this file.

    Returns
    -------
    black, white : float
    """
    if dtype.kind == "b" or (dtype.kind == "f" and pixel_range == "auto"):
        return 0, 1
    if pixel_range == "auto":
        limits = np.iinfo(dtype)
        return limits.min, limits.max
    return pixel_range


def to_uint8(
    values: npt.NDArray[Any], pixel_range: PixelRange
) -> npt.NDArray[np.uint8]:
    """Scale pixels linearly, so that black is 0 and white is 255.

    Computes ``round((value - black) / (white - black) * 255)`` and clips the result.
    ``uint8`` of the full range is returned without a copy.

    Parameters
    ----------
    values : ndarray of any shape
        Booleans, integers or finite floats.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; see `resolve_pixel_range`.

    Returns
    -------
    ndarray of the same shape, uint8
    """
    black, white = resolve_pixel_range(values.dtype, pixel_range)
    if values.dtype == np.uint8 and (black, white) == (0, 255):
        return values
    scaled = values.astype(np.float64)
    # In place, since each temporary array of a large image takes 8 bytes per value.
    scaled -= black
    scaled /= white - black
    scaled *= 255
    return np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)


class WarnOnce:
    """Issue one warning of each kind, for all images of a call and from any thread."""

    def __init__(self) -> None:
        self._remaining = {"contrast", "transparency"}

    def __call__(self, kind: str, message: str) -> None:
        """Issue a UserWarning, unless one of this kind has been issued."""
        try:
            self._remaining.remove(kind)  # atomic, and can be pickled, unlike a lock
        except KeyError:
            return
        warnings.warn(message, UserWarning, stacklevel=3)


def low_contrast(name: str, max_value: int, limits: tuple[int, int]) -> str | None:
    """Return a warning if values reach less than an eighth of the range of a dtype.

    They probably have fewer bits than the dtype, such as 12 bits stored in 16. An image
    that is black everywhere is not reported.

    Parameters
    ----------
    name : str
        Name of the image in the message.
    max_value : int
        Largest absolute value of the image.
    limits : tuple of two ints
        Smallest and largest value of the dtype, used as black and white.

    Returns
    -------
    str or None
    """
    black, white = limits
    if not 0 < 8 * max_value <= white:
        return None
    largest = "largest absolute value" if black < 0 else "largest value"
    return (
        f"The {largest} of {name} is {max_value}, less than an eighth of {white}, but "
        f"pixel_range='auto' uses {limits}, the values of black and white of "
        "the data type, so that the image has hardly any contrast. If its values have "
        "fewer bits, set pixel_range=(black, white), e.g. "
        f"(0, {2 ** max_value.bit_length() - 1}); pixel_range={limits} confirms the "
        "range."
    )


def check_pixel_range(pixel_range: object) -> None:
    """Raise ValueError if `pixel_range` is neither "auto" nor an increasing pair."""
    if isinstance(pixel_range, str) and pixel_range == "auto":
        return
    if (
        isinstance(pixel_range, tuple | list)
        and len(pixel_range) == 2
        and all(isinstance(value, Real) for value in pixel_range)
        and 0 < float(pixel_range[1]) - float(pixel_range[0]) < math.inf
    ):
        return
    raise ValueError(
        "pixel_range must be 'auto' or a pair (black, white) of finite values with "
        f"black < white. Got {pixel_range!r}."
    )


class _IntegerContrast:
    """Finds images of 8 or 16 bits with values below an eighth of their range.

    Each image of 16 bits is reported, but images of 8 bits only if there are several
    and all of them are so dark, since single dark images of 8 bits are common.
    """

    def __init__(self) -> None:
        self._message_16: str | None = None
        self._message_8: str | None = None
        self._has_bright_8 = False
        self._n_8 = 0

    def add(self, name: str, images: npt.NDArray[Any], is_stack: bool) -> None:
        """Check an image, or a stack of images along the first axis."""
        dtype, limits = images.dtype, np.iinfo(images.dtype)
        for index, image in enumerate(images if is_stack else images[np.newaxis]):
            if self._has_bright_8 if dtype.itemsize == 1 else self._message_16:
                return
            self._n_8 += dtype.itemsize == 1
            if image.ndim == 3 and image.shape[2] == 4:
                image = image[:, :, :3]  # without alpha
            max_value = int(image.max())
            if dtype.kind == "i":
                max_value = max(max_value, -int(image.min()))
            image_name = f"{name}[{index}]" if is_stack else name
            message = low_contrast(image_name, max_value, (limits.min, limits.max))
            if dtype.itemsize == 2:
                self._message_16 = message
            elif message or max_value == 0:
                self._message_8 = self._message_8 or message
            else:
                self._has_bright_8 = True

    def message(self) -> str | None:
        """Return a warning, if any."""
        is_dark_8 = self._n_8 > 1 and not self._has_bright_8
        return self._message_16 or (self._message_8 if is_dark_8 else None)


def check_pixel_values(
    arrays: Iterable[tuple[str, npt.NDArray[Any]]],
    pixel_range: PixelRange,
    *,
    is_stack: bool = False,
) -> None:
    """Check the dtypes and values of arrays of pixels before any image is decoded.

    Integers of 8 bits with the range of their dtype are read only until one image is
    bright, and wider integers than 16 bits not at all.

    Parameters
    ----------
    arrays : iterable of (str, ndarray)
        Arrays of pixels with their names in messages, such as ``"X[3]"``.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; see `resolve_pixel_range`.
    is_stack : bool, default=False
        Whether each array contains several images, along its first axis.

    Raises
    ------
    ValueError
        If an array has an unsupported dtype, or contains NaN or infinity.

    Warns
    -----
    UserWarning
        Once, if values are outside `pixel_range`. If `pixel_range` is "auto": once, if
        an array has an integer dtype of more than 16 bits, and once, if the values of
        integers are far below their range.
    """
    wide_integers = clipped = ""
    contrast = _IntegerContrast()
    for name, pixels in arrays:
        kind = pixels.dtype.kind
        if kind not in "biuf":
            raise ValueError(
                f"{name} has dtype {pixels.dtype}. Pixels must be booleans, integers "
                "or floats."
            )
        if kind == "b" or (kind in "iu" and pixel_range == "auto"):
            if pixels.dtype.itemsize > 2:
                wide_integers = wide_integers or f"{name} has dtype {pixels.dtype}"
            elif kind != "b":
                contrast.add(name, pixels, is_stack)
            continue
        min_value, max_value = float(pixels.min()), float(pixels.max())
        if not (math.isfinite(min_value) and math.isfinite(max_value)):
            raise ValueError(
                f"{name} contains NaN or infinity. Replace these values, or the image."
            )
        black, white = resolve_pixel_range(pixels.dtype, pixel_range)
        if (min_value < black or max_value > white) and not clipped:
            clipped = f"{name} has values from {min_value:g} to {max_value:g}"
    if message := contrast.message():
        warnings.warn(message, UserWarning, stacklevel=3)
    if wide_integers:
        warnings.warn(
            f"{wide_integers}, and pixel_range='auto' maps the full range of the dtype "
            "to black and white, so that small values are indistinguishable. Set "
            "pixel_range=(black, white), e.g. (0, 255).",
            UserWarning,
            stacklevel=3,
        )
    if clipped:
        warnings.warn(
            f"{clipped}; values outside pixel_range={pixel_range!r}"
            f"{', which is (0, 1) for floats,' if pixel_range == 'auto' else ''} are "
            "clipped. Set pixel_range=(black, white).",
            UserWarning,
            stacklevel=3,
        )
