"""Bit depth of image files: which of their values are black and white.

Pillow decodes image files, but applies only a part of what they say about their values.
This module applies the rest:

==============================  ================================================
file                            values of black and white
==============================  ================================================
at most 8 bits per channel      defined by the format
TIFF of n < 16 bits             0 and 2**n - 1, such as 4095 for 12 bits
TIFF and PNG of 16 bits         0 and 65535; see ``sBIT`` below
TIFF of 16 signed bits          -32768 and 32767, as in arrays
PGM and PPM                     0 and the maximum in the header
TIFF of 32 bits, floats         unknown; for floats in [0, 1], 0 and 1
==============================  ================================================

An explicit ``pixel_range`` replaces these values in files of more than 8 bits per
channel, of grey and color. It refers to the values stored in the file.

- In TIFF files with the photometric interpretation white-is-zero, the values are
  inverted within this range, at every depth and also floats, as TIFF 6.0 defines it.
  Pillow inverts up to 8 bits, libvips integers of up to 16 bits, ImageMagick 6 those of
  1, 8 and 16 bits.
- Signed bytes in TIFF files are read as unsigned, as by Pillow and ImageMagick, because
  programs write this tag to files of unsigned bytes.
- ``sBIT`` in a 16-bit PNG is the number of significant bits. The standard demands
  that they are scaled to 16 bits, so that white is 65535. Some programs store them
  unscaled: if no value exceeds this number of bits, and the values are not multiples
  that scaling could have produced, white is the largest value of this number of bits.
- ``MinSampleValue``, ``MaxSampleValue`` and their ``S`` variants in TIFF files are
  ignored, as TIFF 6.0 demands: they describe the content of a single image.

PIL images have the values that Pillow assigns to them, and no ``sBIT``: colors have 8
bits, and PGM and PPM have been scaled to 65535 or 255.
"""

import contextlib
import io
import struct
from dataclasses import dataclass, replace
from typing import IO, Any

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sktl._images.file_formats import FileOptions, open_image_file
from sktl._images.packed_tiff import is_packed_grey, open_bytes
from sktl._images.tiff_header import (
    BITS_PER_SAMPLE,
    BLACK_IS_ZERO,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SIGNED,
    UNSIGNED,
    WHITE_IS_ZERO,
    TiffHeader,
)

_GREY_16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
DEEP_GREY_MODES = (*_GREY_16_MODES, "I", "F")
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Raw modes of Pillow for values that libtiff has already converted to the byte order of
# the machine, by the raw modes of big-endian files that Pillow uses instead.
_NATIVE_ORDER = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
_FEW_BITS = {"L;2": 2, "L;4": 4}


@dataclass(frozen=True)
class BitDepth:
    """What a file says about its values, where Pillow does not apply it.

    Attributes
    ----------
    black, white : int or None
        Values of black and white; None if they are unknown.
    is_stated : bool
        Whether the file says its number of bits. Files of 16 bits often have fewer.
    has_deep_colors : bool
        Whether the file has several channels of 16 bits, of which Pillow reads 8.
        False for PIL images, which have only these 8.
    white_is_zero : bool
        Whether the values must be inverted.
    is_unsigned : bool
        Whether values of 32 bits are unsigned, which Pillow reads as signed.
    significant_bits : tuple of int
        Number of significant bits of each channel of a PNG of 16 bits, if stated.
    packed : TiffHeader or None
        Header of a TIFF file whose values Pillow cannot unpack; see
        `sktl._images.packed_tiff`.
    """

    black: int | None = None
    white: int | None = None
    is_stated: bool = True
    has_deep_colors: bool = False
    white_is_zero: bool = False
    is_unsigned: bool = False
    significant_bits: tuple[int, ...] = ()
    packed: TiffHeader | None = None


def open_image(file: IO[bytes], options: FileOptions) -> tuple[ImageFile, BitDepth]:
    """Open an image file with Pillow, and find its bit depth.

    Parameters
    ----------
    file : binary file
        Must stay open until the pixels are loaded.
    options : FileOptions
        Formats that are tried.

    Returns
    -------
    image : PIL.ImageFile.ImageFile
        The opened file; its pixels are not loaded.
    depth : BitDepth

    Raises
    ------
    ValueError
        If it is a TIFF file whose values Pillow cannot read.
    PIL.UnidentifiedImageError
        If Pillow cannot open it for another reason.
    """
    try:
        image = open_image_file(file, options)
    except UnidentifiedImageError:
        if (header := _read_tiff_header(file)) is None:
            raise
        return _open_unsupported_tiff(header)
    correct_tiles(image)
    depth = read_bit_depth(image)
    rawmode = get_rawmode(image.tile[0]) if image.tile else ""
    is_color = image.mode in ("RGB", "RGBA", "CMYK")
    if is_color and isinstance(image, PngImageFile | TiffImageFile):
        if ";16" in rawmode:
            depth = BitDepth(0, 65535, is_stated=False, has_deep_colors=True)
    if rawmode == "L;IR":  # which Pillow chooses, but does not implement
        image.tile = [with_rawmode(tile, "L;R") for tile in image.tile]
        depth = replace(depth, white_is_zero=True)
    if isinstance(image, PngImageFile):
        if depth.white == 65535:
            depth = replace(depth, significant_bits=_read_significant_bits(file))
        if rawmode in _FEW_BITS and isinstance(image.info.get("transparency"), int):
            # Pillow scales the pixels to 8 bits, but not the transparent value.
            image.info["transparency"] *= 255 // (2 ** _FEW_BITS[rawmode] - 1)
    return image, depth


def _read_tiff_header(file: IO[bytes]) -> TiffHeader | None:
    """Read the header of a TIFF file; None if it is damaged or of another format."""
    file.seek(0)
    if file.read(4) not in _TIFF_SIGNATURES:
        return None
    file.seek(0)
    try:
        return TiffHeader(file.read())
    except ValueError:
        return None


def _open_unsupported_tiff(header: TiffHeader) -> tuple[ImageFile, BitDepth]:
    """Open a TIFF file that Pillow supports only with other tags."""
    is_inverted = header[PHOTOMETRIC] == WHITE_IS_ZERO
    if is_inverted:
        content = io.BytesIO(header.replace({PHOTOMETRIC: BLACK_IS_ZERO}))
        with contextlib.suppress(UnidentifiedImageError):
            image = open_image_file(content, FileOptions())
            correct_tiles(image)
            return image, replace(read_bit_depth(image), white_is_zero=True)
    if is_packed_grey(header):
        with contextlib.suppress(UnidentifiedImageError):
            depth = BitDepth(packed=header, white_is_zero=is_inverted)
            n_bits, sample_format = header[BITS_PER_SAMPLE], header[SAMPLE_FORMAT]
            if sample_format == UNSIGNED and n_bits <= 16:
                white = 2**n_bits - 1
                depth = replace(depth, black=0, white=white, is_stated=n_bits < 16)
            elif sample_format == SIGNED and n_bits == 16:
                depth = replace(depth, black=-(2**15), white=2**15 - 1, is_stated=False)
            elif sample_format == UNSIGNED:
                depth = replace(depth, is_unsigned=True)
            return open_bytes(header), depth
    raise ValueError(
        f"it is a TIFF file of {header.describe()}, which Pillow cannot read, or it is "
        "damaged"
    )


def correct_tiles(image: Image.Image) -> None:
    """Correct the raw modes of a TIFF file in which Pillow confuses bytes.

    Parameters
    ----------
    image : PIL.Image.Image
        Modified, unless its pixels have been loaded already.
    """
    if not isinstance(image, TiffImageFile):
        return
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    is_16_bit = 16 in _as_tuple(image.tag_v2.get(BITS_PER_SAMPLE))
    for index, tile in enumerate(image.tile):
        rawmode = get_rawmode(tile)
        if tile.codec_name == "libtiff" and rawmode in _NATIVE_ORDER:
            image.tile[index] = with_rawmode(tile, _NATIVE_ORDER[rawmode])
        elif is_16_bit and len(rawmode) == 1 and image.mode in ("RGB", "RGBA", "CMYK"):
            # Pillow unpacks uncompressed planes of 16 bits as if they had 8.
            image.tile[index] = with_rawmode(tile, f"{rawmode};16{order}")


def read_bit_depth(image: Image.Image) -> BitDepth:
    """Return the bit depth of a PIL image, whose pixels may be loaded or not.

    Parameters
    ----------
    image : PIL.Image.Image
        Image as returned by ``Image.open``; other images have no tags.

    Returns
    -------
    BitDepth
    """
    depth = BitDepth()
    if image.mode in _GREY_16_MODES or (
        image.mode == "I" and isinstance(image, PpmImageFile)
    ):
        depth = BitDepth(0, 65535, is_stated=False)
    if isinstance(image, TiffImageFile):
        return _read_tiff_depth(image, depth)
    return depth


def _read_tiff_depth(image: TiffImageFile, depth: BitDepth) -> BitDepth:
    """Add the tags of a TIFF file to a bit depth."""
    tags = image.tag_v2
    n_bits = max(_as_tuple(tags.get(BITS_PER_SAMPLE)) or (1,))
    is_signed = max(_as_tuple(tags.get(SAMPLE_FORMAT)) or (1,)) == SIGNED
    if image.mode in _GREY_16_MODES and n_bits < 16:
        depth = BitDepth(0, 2**n_bits - 1)
    elif image.mode == "I" and is_signed and n_bits == 16:
        depth = BitDepth(-(2**15), 2**15 - 1, is_stated=False)
    elif image.mode == "I":
        depth = BitDepth(is_unsigned=not is_signed)
    if image.mode in DEEP_GREY_MODES:
        # Without this required tag, Pillow inverts up to 8 bits; other readers raise.
        is_inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        depth = replace(depth, white_is_zero=is_inverted)
    return depth


def _as_tuple(value: Any) -> tuple[int, ...]:
    """Return the value of a TIFF tag as a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _read_significant_bits(file: IO[bytes]) -> tuple[int, ...]:
    """Read the chunk sBIT of a PNG of 16 bits; empty if all bits are significant."""
    position = file.tell()
    file.seek(8)
    bits: tuple[int, ...] = ()
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"sBIT" and length <= 4:
            bits = tuple(file.read(length))
        if kind in (b"sBIT", b"IDAT"):
            break
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return bits if all(0 < n <= 16 for n in bits) and min(bits, default=16) < 16 else ()


def get_rawmode(tile: Any) -> str:
    """Return Pillow's name of the layout of stored values; empty if it has none.

    Parameters
    ----------
    tile : tuple
        Element of the attribute ``tile`` of an image of Pillow that is not loaded.

    Returns
    -------
    str
    """
    rawmode = tile.args[0] if isinstance(tile.args, tuple) else tile.args
    return rawmode if isinstance(rawmode, str) else ""


def with_rawmode(tile: Any, rawmode: str) -> Any:
    """Return a tile with another layout of its stored values.

    Parameters
    ----------
    tile : tuple
        As in `get_rawmode`.
    rawmode : str
        Layout of as many bits.

    Returns
    -------
    tuple
    """
    if isinstance(tile.args, str):
        return tile._replace(args=rawmode)
    return tile._replace(args=(rawmode, *tile.args[1:]))
