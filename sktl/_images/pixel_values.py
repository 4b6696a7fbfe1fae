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


def check_pixel_values(
    arrays: Iterable[tuple[str, npt.NDArray[Any]]], pixel_range: PixelRange
) -> None:
    """Check the dtypes and values of arrays of pixels before any image is decoded.

    Values are read only where necessary: for floats, and if `pixel_range` is explicit.

    Parameters
    ----------
    arrays : iterable of (str, ndarray)
        Arrays of pixels with their names in messages, such as ``"X[3]"``.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; see `resolve_pixel_range`.

    Raises
    ------
    ValueError
        If an array has an unsupported dtype, or contains NaN or infinity.

    Warns
    -----
    UserWarning
        Once, if values are outside `pixel_range`. Once, if `pixel_range` is "auto" and
        an array has an integer dtype of more than 16 bits.
    """
    wide_integers = clipped = ""
    for name, pixels in arrays:
        kind = pixels.dtype.kind
        if kind not in "biuf":
            raise ValueError(
                f"{name} has dtype {pixels.dtype}. Pixels must be booleans, integers "
                "or floats."
            )
        if kind == "b" or (kind in "iu" and pixel_range == "auto"):
            if pixels.dtype.itemsize > 2 and not wide_integers:
                wide_integers = f"{name} has dtype {pixels.dtype}"
            continue
        min_value, max_value = float(pixels.min()), float(pixels.max())
        if not (math.isfinite(min_value) and math.isfinite(max_value)):
            raise ValueError(
                f"{name} contains NaN or infinity. Replace these values, or the image."
            )
        black, white = resolve_pixel_range(pixels.dtype, pixel_range)
        if (min_value < black or max_value > white) and not clipped:
            clipped = f"{name} has values from {min_value:g} to {max_value:g}"
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
