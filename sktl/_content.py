"""Which picture is this: a key that depends on its content alone.

A file is known by the sha256 of its bytes, wherever it lies and whatever it is called;
an array by that of its dtype, shape and pixels. Two keys are equal only if the pictures
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

from sktl._decode import (
    PixelRange,
    as_array,
    decode,
    describe,
    errors_naming,
    open_regular,
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


def content_keys(
    pictures: Iterable[Any], rows: Iterable[int], *, pixel_range: PixelRange
) -> list[bytes]:
    """Give the keys of pictures, in order; see `content_key`."""
    return [
        (isinstance(picture, str) and _remembered_key(picture))
        or content_key(picture, row=row, pixel_range=pixel_range)
        for row, picture in zip(rows, pictures, strict=True)
    ]


def content_key(picture: Any, *, row: int, pixel_range: PixelRange) -> bytes:
    """Give the key of a picture.

    The key of a file that was read before in this process is remembered as long as
    path, size, times of change and inode stay as they are.

    Parameters
    ----------
    picture : str, os.PathLike, bytes, PIL.Image.Image or array-like
        One picture, as `sktl._decode.decode` takes it.
    row : int
        Where the picture stands in X, for error messages.
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
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).digest()
    if isinstance(picture, str | os.PathLike):
        return _key_of_file(picture, describe(picture, row))
    if isinstance(picture, Image.Image):
        # Its pixels are there already, and palettes, transparency and orientation
        # make them what they are: so by what becomes of it.
        picture = decode(picture, row=row, pixel_range=pixel_range)
    return _key_of_pixels(picture, describe(picture, row))


def keyed(
    picture: Any,
    *,
    row: int,
    pixel_range: PixelRange,
    least_side: int | None = None,
) -> tuple[bytes, Image.Image]:
    """Decode a picture, and give the key of what was decoded.

    Which is another one than before if the file changed since.

    Parameters
    ----------
    picture, row, pixel_range
        As in `content_key`.
    least_side : int, optional
        As in `decode`; the key does not depend on it.

    Returns
    -------
    key : bytes
        32 of them.
    picture : PIL.Image.Image
        Upright, mode "RGB".

    Raises
    ------
    ValueError
        If it cannot be read: names the row, the path and the reason.
    """
    if isinstance(picture, str | os.PathLike):
        name = describe(picture, row)
        with open_regular(picture, name) as file, errors_naming(name):
            content = file.read()
        key = hashlib.sha256(content).digest()
    else:
        content = None
        key = content_key(picture, row=row, pixel_range=pixel_range)
    return key, decode(
        picture,
        row=row,
        pixel_range=pixel_range,
        content=content,
        least_side=least_side,
    )


def _remembered_key(path: str) -> bytes | None:
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
    if (remembered := _remembered_key(text)) is not None:
        return remembered
    now = time.time_ns()
    file: Any  # hashlib's types ask for more than typing's IO has
    with open_regular(path, name) as file, errors_naming(name):
        status = os.fstat(file.fileno())
        key = hashlib.file_digest(file, "sha256").digest()
    if max(status.st_mtime_ns, status.st_ctime_ns) < now - _SETTLED_NS:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        _remembered[_absolute(text)] = (_signature(status), key)
    return key


def _key_of_pixels(picture: Any, name: str) -> bytes:
    pixels = as_array(picture, name)
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data.cast("B"))
    return digest.digest()
