"""Content hashes: keys of images that depend on their content only.

The content hash of a file is the sha256 of its bytes, whatever its name and location;
that of an array is the sha256 of its dtype, shape and pixels. Images with different
content have different hashes.
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
    as_array,
    decode,
    describe,
    open_regular_file,
    reraise_read_errors,
)
from sktl._images.file_formats import FileOptions
from sktl._images.pixel_values import PixelRange, WarnOnce

_DEFAULT_OPTIONS = FileOptions()

# A file that changes twice within one tick of the clock of the file system may keep its
# modification time. Hashes of files younger than this are not cached (as in git's
# index).
_MIN_AGE_NS = 2_000_000_000
_MAX_CACHED_HASHES = 2**20  # then the cache is emptied

# Fingerprint and content hash of files, by absolute path.
_hash_cache: dict[str, tuple[tuple[int, ...], bytes]] = {}
# A single C function, since it is called for each file in each call.
_file_fingerprint: Callable[[os.stat_result], tuple[int, ...]] = operator.attrgetter(
    "st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"
)


def content_hashes(
    images: Iterable[Any], indices: Iterable[int | str], *, pixel_range: PixelRange
) -> list[bytes]:
    """Return the content hash of each image; see `content_hash`."""
    return [
        (isinstance(image, str) and _cached_hash(image))
        or content_hash(image, index=index, pixel_range=pixel_range)
        for index, image in zip(indices, images, strict=True)
    ]


def content_hash(image: Any, *, index: int | str, pixel_range: PixelRange) -> bytes:
    """Return the content hash of an image.

    The hash of a file is cached as long as its path, size, modification times and inode
    do not change.

    Parameters
    ----------
    image : str, os.PathLike, bytes, PIL.Image.Image or array-like
        One image, as in `sktl._images.decode.decode`.
    index : int or str
        Index of the image in X, or its name, for error messages.
    pixel_range : tuple of two floats or "auto"
        Values of black and white, for PIL images.

    Returns
    -------
    bytes
        Hash of 32 bytes.

    Raises
    ------
    ValueError
        If a file cannot be read; its content is not decoded.
    """
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if isinstance(image, str | os.PathLike):
        return _hash_file(image, describe(image, index))
    if isinstance(image, Image.Image):
        # Hash the decoded pixels, which depend on palette, transparency and orientation
        # as well.
        image = decode(image, index=index, pixel_range=pixel_range)
    return _hash_pixels(image, describe(image, index))


def decode_and_hash(
    image: Any,
    *,
    index: int | str,
    pixel_range: PixelRange,
    min_decode_size: int | None = None,
    file_options: FileOptions = _DEFAULT_OPTIONS,
    warn: WarnOnce | None = None,
) -> tuple[bytes, Image.Image]:
    """Decode an image and return the hash of exactly the content that was decoded.

    If a file has changed since it was last hashed, its new hash is returned.

    Parameters
    ----------
    image, index, pixel_range
        As in `content_hash`.
    min_decode_size, file_options, warn : optional
        As in `decode`; do not affect the hash.

    Returns
    -------
    content_hash : bytes
        Hash of 32 bytes.
    image : PIL.Image.Image
        Upright image in mode "RGB".

    Raises
    ------
    ValueError
        If the image cannot be read; names its index, its path and the reason.
    """
    if isinstance(image, str | os.PathLike):
        name = describe(image, index)
        with open_regular_file(image, name) as file, reraise_read_errors(name):
            content = file.read()
        digest = hashlib.sha256(content).digest()
    else:
        content = None
        digest = content_hash(image, index=index, pixel_range=pixel_range)
    return digest, decode(
        image,
        index=index,
        pixel_range=pixel_range,
        content=content,
        min_decode_size=min_decode_size,
        file_options=file_options,
        warn=warn,
    )


def _cached_hash(path: str) -> bytes | None:
    try:
        # Most paths are absolute: joining them would cost as much as os.stat.
        entry = _hash_cache.get(path) or _hash_cache.get(_absolute(path))
        if entry is None:
            return None
        return entry[1] if entry[0] == _file_fingerprint(os.stat(path)) else None
    except (OSError, ValueError):
        return None  # missing or invalid path: opening it raises the right error


def _absolute(path: str) -> str:
    # Not os.path.abspath, which takes link/../a for a. It may be another file.
    return os.path.join(os.getcwd(), path)


def _hash_file(path: str | os.PathLike[Any], name: str) -> bytes:
    text = os.fsdecode(path)
    if (cached := _cached_hash(text)) is not None:
        return cached
    now = time.time_ns()
    file: Any  # typing.IO lacks a method that the types of hashlib require
    with open_regular_file(path, name) as file, reraise_read_errors(name):
        status = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").digest()
    if max(status.st_mtime_ns, status.st_ctime_ns) < now - _MIN_AGE_NS:
        if len(_hash_cache) >= _MAX_CACHED_HASHES:
            _hash_cache.clear()
        _hash_cache[_absolute(text)] = (_file_fingerprint(status), digest)
    return digest


def _hash_pixels(image: Any, name: str) -> bytes:
    pixels = as_array(image, name)
    digest = hashlib.sha256(f"{pixels.dtype.str} {pixels.shape} ".encode())
    digest.update(np.ascontiguousarray(pixels).data.cast("B"))
    return digest.digest()
