"""Alpha channels, which may be something else than transparency."""

import warnings
from typing import Any

import numpy.typing as npt
from PIL import Image

from sktl._images.pixel_values import PixelRange, to_uint8


def is_nowhere_opaque(pixels: npt.NDArray[Any], pixel_range: PixelRange) -> bool:
    """Return whether no pixel of an image with an alpha channel is opaque.

    Parameters
    ----------
    pixels : ndarray of shape (height, width) or (height, width, channels)
        Valid pixels. Only four channels include an alpha channel, the last one.
    pixel_range : tuple of two floats or "auto"
        Values of black and white; opaque pixels have the alpha of white.

    Returns
    -------
    bool
    """
    if pixels.ndim != 3 or pixels.shape[2] != 4:
        return False
    alpha = pixels[..., 3]  # (height, width)
    # Most images have an opaque pixel in their middle row: then, it alone is read.
    for part in (alpha[len(alpha) // 2], alpha):
        if to_uint8(part.max(keepdims=True), pixel_range).item() == 255:
            return False
    return True


def hides_pixels(image: Image.Image) -> bool:
    """Return whether an image is transparent everywhere, but has several colors.

    Parameters
    ----------
    image : PIL.Image.Image
        Only images in mode RGBA are checked. A blank image has one color.

    Returns
    -------
    bool
    """
    if image.mode != "RGBA" or image.getchannel("A").getextrema() != (0, 0):
        return False
    return image.convert("RGB").getcolors(1) is None  # more than one


def warn_of_alpha(name: str) -> None:
    """Warn that an image for which `is_nowhere_opaque` is true may not be RGBA."""
    warnings.warn(
        f"{name} has four channels, and the fourth, its alpha channel, has no opaque "
        "pixel: composited on white, little or nothing of the image is left. If the "
        "fourth channel is not transparency (but for example near infrared), pass "
        "three channels, such as X[..., :3] or X[..., [3, 0, 1]], or "
        "[image[..., :3] for image in X].",
        UserWarning,
        stacklevel=3,
    )
