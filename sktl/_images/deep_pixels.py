"""All bits of colors of 16 bits per channel, and of PGM and PPM files.

Pillow returns the high byte of each value of a color image. The low byte is read by
exchanging the bytes, that is, with the byte order of the other processors. PGM and PPM
files are read without Pillow, which scales their values.
"""

import math
import re
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sktl._images.bit_depth import BitDepth, get_rawmode, with_rawmode
from sktl._images.pixel_values import PixelRange

_PLANAR_CONFIGURATION = 284
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


def needs_all_bits(image: ImageFile, depth: BitDepth, pixel_range: PixelRange) -> bool:
    """Return whether 8 bits of each value, as Pillow reads them, are not sufficient.

    Parameters
    ----------
    image : PIL.ImageFile.ImageFile
        Image from `open_image`, not loaded.
    depth : BitDepth
        Its bit depth.
    pixel_range : tuple of two floats or "auto"
        Values of black and white.

    Returns
    -------
    bool
    """
    if isinstance(image, PpmImageFile):
        return _netpbm_maximum(image) > 255
    return depth.has_deep_colors and (
        pixel_range != "auto"
        or bool(depth.significant_bits)
        or "transparency" in image.info
    )


def has_only_small_values(image: Image.Image, depth: BitDepth) -> bool:
    """Return whether all colors of 16 bits are below an eighth of the range.

    Pillow returns few distinct values of such an image.

    Parameters
    ----------
    image : PIL.Image.Image
        Loaded image.
    depth : BitDepth
        Its bit depth.

    Returns
    -------
    bool
    """
    if not depth.has_deep_colors:
        return False
    extrema = np.reshape(image.getextrema(), (-1, 2))[:3]  # without alpha
    return bool(extrema.max() < 32)


def can_read_all_bits(image: ImageFile) -> bool:
    """Return whether `read_all_bits` supports a file.

    Pillow cannot return the low bytes of compressed TIFF files whose channels are
    stored separately.

    Parameters
    ----------
    image : PIL.ImageFile.ImageFile
        Image from `open_image`, not loaded.

    Returns
    -------
    bool
    """
    return not (
        isinstance(image, TiffImageFile)
        and image.tag_v2.get(_PLANAR_CONFIGURATION) == 2
        and image.tile[0].codec_name == "libtiff"
    )


def read_all_bits(
    file: IO[bytes],
    depth: BitDepth,
    *,
    open_again: Callable[[], ImageFile],
    load: Callable[[Image.Image], Image.Image],
) -> tuple[str, npt.NDArray[np.uint16], BitDepth]:
    """Read all bits of a file of which Pillow returns 8, or scaled values.

    Parameters
    ----------
    file : binary file
        The file.
    depth : BitDepth
        From `open_image`.
    open_again : callable
        Returns the image that is not loaded, each time it is called.
    load : callable
        Loads the pixels of an image and returns it upright.

    Returns
    -------
    mode : str
        Mode of Pillow with 8 bits that the channels have.
    values : ndarray of shape (height, width, channels), uint16
    depth : BitDepth
        Bit depth of these values.

    Raises
    ------
    ValueError
        If the file is damaged, or not supported by `can_read_all_bits`.
    """
    image = open_again()
    if isinstance(image, PpmImageFile):
        maximum = _netpbm_maximum(image)
        values = _read_netpbm(file, image, maximum)
        mode = "L" if image.mode == "I" else image.mode
        return mode, values, BitDepth(0, maximum, is_stated=maximum < 65535)
    if get_rawmode(image.tile[0]) == "LA;16B":
        # The four bytes of each pixel as if they were four channels.
        _set_rawmodes(image, lambda rawmode: "RGBA")
        pairs = np.ascontiguousarray(load(image))
        return "LA", pairs.view(">u2").astype(np.uint16), depth
    if not can_read_all_bits(image):
        raise ValueError(
            "pixel_range is not supported for compressed TIFF files of 16 bits whose "
            "channels are stored separately (PlanarConfiguration 2)"
        )
    mode = "RGBa" if get_rawmode(image.tile[0]).startswith("RGBa") else image.mode
    low = open_again()
    _set_rawmodes(image, lambda rawmode: rawmode.replace("RGBa", "RGBA"))
    _set_rawmodes(
        low,
        lambda rawmode: (
            rawmode[:-1].replace("RGBa", "RGBA") + _OTHER_ORDER[rawmode[-1]]
        ),
    )
    values = np.asarray(load(image)).astype(np.uint16)
    values <<= 8
    values |= np.asarray(load(low))
    return mode, values, depth


def _netpbm_maximum(image: PpmImageFile) -> int:
    """Return the largest value by the header of a PGM or PPM file, at least 255."""
    arguments = image.tile[0].args if image.tile else None
    if isinstance(arguments, tuple) and isinstance(arguments[-1], int):
        return max(arguments[-1], 255)
    return 65535 if arguments == "I;16B" else 255


def _read_netpbm(
    file: IO[bytes], image: PpmImageFile, maximum: int
) -> npt.NDArray[np.uint16]:
    """Read a PGM or PPM file of more than 8 bits, in binary or plain format."""
    shape = image.height, image.width, len(image.getbands())
    file.seek(image.tile[0].offset)
    values: npt.NDArray[Any]
    if image.tile[0].codec_name == "ppm_plain":
        text = re.sub(rb"#[^\r\n]*", b" ", file.read())
        if re.search(rb"[^\d\s]", text):
            raise ValueError("its pixels contain a character that is not a digit")
        values = np.fromstring(text, dtype=np.int64, sep=" ")[: math.prod(shape)]
        if values.max(initial=0) > maximum:
            raise ValueError(f"its pixels exceed the maximum of {maximum}")
    else:
        values = np.frombuffer(file.read(2 * math.prod(shape)), dtype=">u2")
    if len(values) < math.prod(shape):
        raise OSError("image file is truncated")
    return values.reshape(shape).astype(np.uint16)


def _set_rawmodes(image: ImageFile, change: Callable[[str], str]) -> None:
    image.tile = [with_rawmode(tile, change(get_rawmode(tile))) for tile in image.tile]
