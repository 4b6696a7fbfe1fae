"""Scaling of images of any bit depth to 8 bits per channel, with black at 0."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sktl._images.bit_depth import DEEP_GREY_MODES, BitDepth
from sktl._images.deep_pixels import has_only_small_values
from sktl._images.pixel_values import PixelRange, WarnOnce, low_contrast, to_uint8


def scale_all_bits(
    mode: str,
    values: npt.NDArray[np.uint16],
    depth: BitDepth,
    *,
    name: str,
    pixel_range: PixelRange,
    transparent: Any,
    warn: WarnOnce | None,
) -> Image.Image:
    """Scale the values of `read_all_bits` to an image of 8 bits per channel.

    Parameters
    ----------
    mode, values, depth
        From `read_all_bits`.
    name : str
        Name of the image in messages.
    pixel_range : tuple of two floats or "auto"
        Values of black and white.
    transparent : tuple of int or None
        Transparent color.
    warn : WarnOnce or None
        Warns if the values have hardly any contrast.

    Returns
    -------
    PIL.Image.Image
        Image in `mode`; in mode "RGBA" if there is a transparent color.
    """
    n_channels = values.shape[2]
    if pixel_range != "auto":
        ranges = [pixel_range] * n_channels
    else:
        ranges = [(0, white) for white in _whites(values, depth)]
        n_colors = n_channels - mode.endswith(("A", "a"))
        _check_contrast(int(values[..., :n_colors].max()), depth, name, warn)
    every_value = np.arange(65536, dtype=np.uint16)
    channels = [
        to_uint8(every_value, ranges[channel])[values[..., channel]]
        for channel in range(n_channels)
    ]
    if transparent is not None:
        is_opaque = (values != np.array(transparent)).any(axis=-1)
        channels.append(is_opaque * np.uint8(255))
        mode = "RGBA"
    return Image.merge(mode, [Image.fromarray(channel) for channel in channels])


def _whites(values: npt.NDArray[np.uint16], depth: BitDepth) -> list[int]:
    """Return the value of white of each channel of shape (height, width, channels)."""
    n_channels = values.shape[-1]
    bits = depth.significant_bits
    assert depth.white is not None
    if len(bits) != n_channels:
        return [depth.white] * n_channels
    n_colors = n_channels - (n_channels % 2 == 0)
    whites = []
    for part in (slice(0, n_colors), slice(n_colors, n_channels)):  # colors, alpha
        is_unscaled = _is_unscaled(values[..., part], bits[part])
        whites += [2**n - 1 if is_unscaled else depth.white for n in bits[part]]
    return whites


def _is_unscaled(values: npt.NDArray[np.uint16], bits: tuple[int, ...]) -> bool:
    """Return whether significant bits are stored without scaling them to 16 bits.

    The PNG standard demands scaling, by repetition of the bits, by rounding, or by
    appending zeros, so that small values are multiples up to rounding.
    """
    if any(values[..., i].max() >= 2**n for i, n in enumerate(bits)):
        return False
    for i, n in enumerate(bits):
        channel = values[..., i]
        factor = 65535 / (2**n - 1)
        is_rounded = np.rint(np.rint(channel / factor) * factor) == channel
        has_zeros = channel & (2 ** (16 - n) - 1) == 0
        if not (is_rounded | has_zeros).all():
            return True
    return False


def reduce_to_8_bits(
    image: Image.Image,
    depth: BitDepth,
    *,
    name: str,
    pixel_range: PixelRange,
    warn: WarnOnce | None,
) -> Image.Image:
    """Scale a loaded image to 8 bits per channel, with black at 0.

    Parameters
    ----------
    image : PIL.Image.Image
        Loaded image.
    depth : BitDepth
        Its bit depth.
    name : str
        Name of the image in messages.
    pixel_range : tuple of two floats or "auto"
        Values of black and white.
    warn : WarnOnce or None
        Warns if the values have hardly any contrast.

    Returns
    -------
    PIL.Image.Image
        The same image if nothing has to be done.

    Raises
    ------
    ValueError
        If black and white are unknown, or the image contains NaN or infinity.
    """
    if image.mode in DEEP_GREY_MODES:
        return Image.fromarray(_scale_deep_grey(image, depth, name, pixel_range, warn))
    if depth.white_is_zero:
        image = image.convert("LA") if image.mode == "La" else image
        grey, *alpha = image.split()
        inverted = Image.fromarray(~np.asarray(grey))
        image = Image.merge(image.mode, [inverted, *alpha])
    if pixel_range == "auto" and has_only_small_values(image, depth):
        n_colors = len(image.getbands()) - (image.mode in ("LA", "RGBA"))
        max_high_byte = np.reshape(image.getextrema(), (-1, 2))[:n_colors].max()
        _check_contrast(int(max_high_byte) << 8, depth, name, warn)
    return image


def _scale_deep_grey(
    image: Image.Image,
    depth: BitDepth,
    name: str,
    pixel_range: PixelRange,
    warn: WarnOnce | None,
) -> npt.NDArray[np.uint8]:
    """Scale a grey image of 16 or 32 bits to 8 bits, of shape (height, width)."""
    values = np.asarray(image)
    if depth.is_unsigned:
        values = values.view(np.uint32)
    advice = "Set pixel_range=(black, white)."
    if image.mode == "F":
        min_value, max_value = float(values.min()), float(values.max())
        if not math.isfinite(min_value + max_value):
            raise ValueError(
                f"Image {name} contains NaN or infinity. Replace or remove it."
            )
        if pixel_range == "auto" and (min_value < 0 or max_value > 1):
            raise ValueError(
                f"Image {name} contains floats from {min_value:g} to {max_value:g} "
                "(mode 'F'); black and white are only known for floats in [0, 1]. "
                f"{advice}"
            )
    elif pixel_range == "auto":
        if depth.black is None or depth.white is None:
            raise ValueError(
                f"Image {name} contains 32-bit integers (mode 'I'), for which black "
                f"and white are unknown; its values range from {values.min()} to "
                f"{values.max()}. {advice}"
            )
        _check_contrast(int(np.abs(values.astype(np.int32)).max()), depth, name, warn)
        black, white = depth.black, depth.white
        if depth.significant_bits:
            (white,) = _whites(values[..., np.newaxis], depth)
        pixel_range = black, white
    grey = to_uint8(values, pixel_range)
    if depth.white_is_zero:
        grey = ~grey
    transparent = image.info.get("transparency")
    return grey if transparent is None else np.where(values == transparent, 255, grey)


def _check_contrast(
    max_value: int, depth: BitDepth, name: str, warn: WarnOnce | None
) -> None:
    """Warn if a file of 16 bits, which may contain fewer, has only small values."""
    if warn is None or depth.is_stated or depth.significant_bits:
        return
    assert depth.black is not None
    assert depth.white is not None
    message = low_contrast(name, max_value, (depth.black, depth.white))
    if message:
        warn("contrast", message)
