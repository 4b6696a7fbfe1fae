"""Rows of numbers that are flattened images, and the shape that they had.

===================  =================================================================
``image_shape``      order of the numbers in a row
===================  =================================================================
(h, w)               grey pixels, row by row
(h, w, c)            the same, with the channels of a pixel side by side; c is 1, 3 or 4
(c, h, w)            one channel after the other; c is 1, 3 or 4, and w is none of these
                     numbers, since the shape would be read as (h, w, c) otherwise
"auto"               a square grey image; otherwise a square RGB image, channels last,
                     with a warning; otherwise one row of grey pixels, with a warning
===================  =================================================================
"""

import math
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy.typing as npt

ImageShape = tuple[int, int] | tuple[int, int, int] | Literal["auto"]

#: Numbers of channels that an image may have.
CHANNELS = (1, 3, 4)


def check_image_shape(image_shape: object) -> None:
    """Raise ValueError if `image_shape` is not "auto" or the shape of an image."""
    if isinstance(image_shape, str) and image_shape == "auto":
        return
    if (
        isinstance(image_shape, tuple | list)
        and len(image_shape) in (2, 3)
        and all(isinstance(side, Integral) and int(side) > 0 for side in image_shape)
        and (
            len(image_shape) == 2
            or image_shape[2] in CHANNELS
            or image_shape[0] in CHANNELS
        )
    ):
        return
    raise ValueError(
        "image_shape must be 'auto', (height, width), (height, width, channels) or "
        "(channels, height, width) in pixels, with 1, 3 or 4 channels. Got "
        f"{image_shape!r}."
    )


def infer_flattened_shape(n_features: int, image_shape: ImageShape) -> tuple[int, ...]:
    """Return the shape of an image that is flattened to n_features numbers.

    Parameters
    ----------
    n_features : int
        Number of numbers in a row.
    image_shape : tuple of two or three ints, or "auto"
        Valid for `check_image_shape`; see the table at the top of this file.

    Returns
    -------
    tuple of int
        (h, w), (h, w, c) or (c, h, w).

    Raises
    ------
    ValueError
        If `image_shape` has another number of values.

    Warns
    -----
    UserWarning
        If a row may be an image in more than one way: with three channels, or if it is
        no square image.
    """
    if image_shape != "auto":
        if math.prod(image_shape) != n_features:
            product = " x ".join(str(side) for side in image_shape)
            raise ValueError(
                f"X has {n_features} features, but image_shape={image_shape} requires "
                f"{product} = {math.prod(image_shape)}. Set image_shape to the shape "
                "of the images before they were flattened."
            )
        return tuple(image_shape)
    side = math.isqrt(n_features)
    if side**2 == n_features:
        return side, side
    side = math.isqrt(n_features // 3)
    if 3 * side**2 == n_features:
        if side > 1:  # a single pixel is the same in both layouts
            warnings.warn(
                f"X has {n_features} features; each row of X is used as an RGB image "
                f"of {side} x {side} pixels with the channels last: the red, green and "
                "blue of one pixel, then those of the next. Set "
                f"image_shape=({side}, {side}, 3) if this is right, or "
                f"image_shape=(3, {side}, {side}) if all red values come first, as in "
                "CIFAR-10.",
                UserWarning,
                stacklevel=3,
            )
        return side, side, 3
    warnings.warn(
        f"X has {n_features} features, which is neither a square grey nor a square RGB "
        "image; each row of X is used as an image one pixel high. Set "
        "image_shape=(height, width), (height, width, channels) or (channels, height, "
        "width).",
        UserWarning,
        stacklevel=3,
    )
    return 1, n_features


def unflatten(row: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
    """Return a flattened image in its shape, with the channels last.

    Parameters
    ----------
    row : ndarray of shape (..., n_features)
        One or more flattened images.
    shape : sequence of int
        From `infer_flattened_shape`.

    Returns
    -------
    ndarray of shape (..., h, w) or (..., h, w, c)
        A view of `row`, if possible.
    """
    images = row.reshape(*row.shape[:-1], *shape)
    if len(shape) == 3 and shape[2] not in CHANNELS:
        c, h, w = range(images.ndim - 3, images.ndim)
        return images.transpose(*range(images.ndim - 3), h, w, c)
    return images
