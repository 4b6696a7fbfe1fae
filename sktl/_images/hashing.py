"""Which image is this: a key that depends on its content alone.

A file is known by the sha256 of its bytes, wherever it lies and whatever it is called;
an array by that of its dtype, shape and pixels. Two keys are equal only if the images
are.
"""

import hashlib
import operator
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from sktl._images.decode import (
    PixelRange,
    as_array,
    decode,
    describe,
    open_regular,
    reraise_naming,
)

# A file that changes twice within one tick of the file system's clock looks the same
# after as before. So what is younger than this is not remembered (as in git's index).
_SETTLED_NS = 2_000_000_000
_MOST_REMEMBERED = 2**20

_remembered: dict[str, tuple[tuple[int, ...], bytes]] = {}
# As one function of C: it is called for each file of each call.
_signature: Callable[[os.stat_result], tuple[int, ...]] = operator.attrgetter(
    "st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"
)


def content_hashes(
    images: Iterable[Any], rows: Iterable[int], *, pixel_range: PixelRange
) -> list[bytes]:
    """Give the keys of images, in order; see `content_hash`."""
    return [
        (isinstance(image, str) and _cached_hash(image))
        or content_hash(image, row=row, pixel_range=pixel_range)
        for row, image in zip(rows, images, strict=True)
    ]


def content_hash(image: Any, *, row: int, pixel_range: PixelRange) -> bytes:
    """Give the key of an image.

    The key of a file that was read before in this process is remembered as long as
    path, size, times of change and inode stay as they are.

    Parameters
    ----------
    image : str, os.PathLike, bytes, PIL.Image.Image or array-like
        One image, as `sktl._decode.decode` takes it.
    row : int
        Where the image stands in X, for error messages.
    pixel_range : tuple of two floats or "auto"
        Values of black and white, of PIL images.

    Returns
    -------
    bytes
        32 of them.

    Raises
    ------
    ValueError
        If it is a file that cannot be read; what is in it is not looked at.
    """
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if isinstance(image, str | os.PathLike):
        return _key_of_file(image, describe(image, row))
    if isinstance(image, Image.Image):
        # Its pixels are there already, and palettes, transparency and orientation
        # make them what they are: so by what becomes of it.
        image = decode(image, row=row, pixel_range=pixel_range)
    return _key_of_pixels(image, describe(image, row))


def decode_and_hash(
    image: Any,
    *,
    row: int,
    pixel_range: PixelRange,
    min_decode_size: int | None = None,
) -> tuple[bytes, Image.Image]:
    """Decode an image, and give the key of what was decoded.

    Which is another one than before if the file changed since.

    Parameters
    ----------
    image, row, pixel_range
        As in `content_hash`.
    min_decode_size : int, optional
        As in `decode`; the key does not depend on it.

    Returns
    -------
    key : bytes
        32 of them.
    image : PIL.Image.Image
        Upright, mode "RGB".

    Raises
    ------
    ValueError
        If it cannot be read: names the row, the path and the reason.
    """
    if isinstance(image, str | os.PathLike):
        name = describe(image, row)
        with open_regular(image, name) as file, reraise_naming(name):
            content = file.read()
        key = hashlib.sha256(content).digest()
    else:
        content = None
        key = content_hash(image, row=row, pixel_range=pixel_range)
    return key, decode(
        image,
        row=row,
        pixel_range=pixel_range,
        content=content,
        min_decode_size=min_decode_size,
    )


def _cached_hash(path: str) -> bytes | None:
    try:
        # As it stands if absolute, as most are: joining costs as much as os.stat.
        known = _remembered.get(path) or _remembered.get(_absolute(path))
        if known is None:
            return None
        return known[1] if known[0] == _signature(os.stat(path)) else None
    except (OSError, ValueError):
        return None  # gone, or a name that none can have: reading it will tell


def _absolute(path: str) -> str:
    # Not os.path.abspath: to it link/../a is a, which may be another file.
    return os.path.join(os.getcwd(), path)


def _key_of_file(path: str | os.PathLike[Any], name: str) -> bytes:
    text = os.fsdecode(path)
    if (remembered := _cached_hash(text)) is not None:
        return remembered
    now = time.time_ns()
    file: Any  # hashlib's types ask for more than typing's IO has
    with open_regular(path, name) as file, reraise_naming(name):
        status = os.fstat(file.fileno())
        key = hashlib.file_digest(file, "sha256").digest()
    if max(status.st_mtime_ns, status.st_ctime_ns) < now - _SETTLED_NS:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        _remembered[_absolute(text)] = (_signature(status), key)
    return key


def _key_of_pixels(image: Any, name: str) -> bytes:
    pixels = as_array(image, name)
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data.cast("B"))
    return digest.digest()
