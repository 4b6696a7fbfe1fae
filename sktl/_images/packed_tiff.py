"""Grey TIFF files of bit depths and byte orders that Pillow does not support.

Pillow reads the bytes of each row, as if they were pixels of 8 bits, and decompresses
them. The values are unpacked from these bytes: integers of 3 to 15 bits, and integers
and floats of 16, 32 and 64 bits in both byte orders.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ImageFile import ImageFile

from sktl._images import tiff_header as tags
from sktl._images.file_formats import FileOptions, open_image_file
from sktl._images.tiff_header import TiffHeader

# No, LZW, deflate, old deflate and PackBits: lossless, of bytes.
_COMPRESSIONS = (1, 5, 8, 32946, 32773)
_KINDS = {tags.UNSIGNED: "u", tags.SIGNED: "i", tags.FLOAT: "f"}
_DTYPES = ("u2", "u4", "i2", "i4", "f2", "f4", "f8")


def is_packed_grey(header: TiffHeader) -> bool:
    """Return whether the values of a TIFF file can be unpacked.

    Parameters
    ----------
    header : TiffHeader
        Header of the file.

    Returns
    -------
    bool
    """
    n_bits, kind = header[tags.BITS_PER_SAMPLE], _KINDS.get(header[tags.SAMPLE_FORMAT])
    return (
        header[tags.SAMPLES_PER_PIXEL] == 1
        and tags.PHOTOMETRIC in header
        and header[tags.PHOTOMETRIC] in (tags.WHITE_IS_ZERO, tags.BLACK_IS_ZERO)
        and header[tags.PREDICTOR] == 1
        and header[tags.COMPRESSION] in _COMPRESSIONS
        and tags.WIDTH in header
        and tags.HEIGHT in header
        and (f"{kind}{n_bits // 8}" in _DTYPES if n_bits % 8 == 0 else n_bits < 16)
        and (n_bits % 8 == 0 or kind == "u")
    )


def open_bytes(header: TiffHeader) -> ImageFile:
    """Open a TIFF file as an image whose pixels are the bytes of the values.

    Parameters
    ----------
    header : TiffHeader
        Header of the file, for which `is_packed_grey` is true.

    Returns
    -------
    PIL.ImageFile.ImageFile
        Image of mode "L", not loaded and not upright.
    """
    n_bits = header[tags.BITS_PER_SAMPLE]
    changes = {
        tags.WIDTH: _n_bytes(header[tags.WIDTH], n_bits),
        tags.BITS_PER_SAMPLE: 8,
        tags.PHOTOMETRIC: tags.BLACK_IS_ZERO,
        tags.SAMPLE_FORMAT: tags.UNSIGNED,
        tags.ORIENTATION: 1,
    }
    if tags.TILE_WIDTH in header:
        changes[tags.TILE_WIDTH] = _n_bytes(header[tags.TILE_WIDTH], n_bits)
    return open_image_file(io.BytesIO(header.replace(changes)), FileOptions())


def _n_bytes(n_values: int, n_bits: int) -> int:
    return -(-n_values * n_bits // 8)


def unpack(image: Image.Image, header: TiffHeader) -> Image.Image:
    """Return the image whose bytes have been read by Pillow.

    Parameters
    ----------
    image : PIL.Image.Image
        Image from `open_bytes`.
    header : TiffHeader
        Header of the file.

    Returns
    -------
    PIL.Image.Image
        Image of mode "I;16", "I" or "F", with the orientation tag of the file.
    """
    rows = np.asarray(image)  # (height, bytes)
    n_bits, width = header[tags.BITS_PER_SAMPLE], header[tags.WIDTH]
    if n_bits % 8:
        values = _unpack_bits(rows, n_bits, width)
    else:
        kind = _KINDS[header[tags.SAMPLE_FORMAT]]
        values = rows.view(f"{header.byteorder}{kind}{n_bits // 8}")
        if kind == "f":
            with np.errstate(over="ignore"):  # infinity raises an error later
                values = values.astype(np.float32)
        elif values.dtype.str[1:] == "u4":
            values = values.astype(np.uint32).view(np.int32)  # as Pillow has them
        else:
            values = values.astype(np.uint16 if kind == "u" else np.int32)
    unpacked = Image.fromarray(values)
    unpacked.getexif()[tags.ORIENTATION] = header[tags.ORIENTATION]
    return unpacked


def _unpack_bits(
    rows: npt.NDArray[np.uint8], n_bits: int, width: int
) -> npt.NDArray[np.uint16]:
    """Unpack values of less than 16 bits, the highest bit first."""
    bits = np.unpackbits(rows, axis=1, count=width * n_bits)
    bits = bits.reshape(len(rows), width, n_bits)
    values = np.zeros((len(rows), width), np.uint16)
    for bit in range(n_bits):
        values <<= 1
        values |= bits[:, :, bit]
    return values
