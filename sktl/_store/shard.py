"""Format of the files of a store: naming, listing and reading shards.

A shard is a safetensors file of up to some thousand rows that is written once and never
changed. It holds ``keys`` (n, 32), ``checksums`` (n,) and ``rows`` (n, ...), and is
renamed into place when complete. Its name begins with the timestamp, in nanoseconds, of
its oldest row; files with other names are not part of the store.

Reading a shard neither unpickles nor executes anything. Files are not memory-mapped: if
another process truncates a mapped file, reading it ends the process by a signal,
whereas reading an ordinary file raises an error.
"""

import contextlib
import json
import math
import os
import re
import struct
import time
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_SHARD_NAME = re.compile(r"\d{20}-[0-9a-f]{12}\.safetensors")
_STORE_FILE_NAME = re.compile(
    r"\d{20}-[0-9a-f]{12}(\.safetensors|\.corrupt|-[0-9a-f]{12}\.tmp)"
    r"|space(\.json|-[0-9a-f]{12}\.tmp)"
)
KEY_BYTES = 32  # of a sha256
BYTES_BESIDES_ROW = KEY_BYTES + 4  # key and checksum
DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}  # safetensors name: NumPy name
_MAX_HEADER_BYTES = 2**20
# A folder may change twice within one tick of the clock of the file system and keep its
# modification time. Two seconds exceed a tick of any file system.
_MIN_AGE_NS = 2_000_000_000


@dataclass(eq=False)
class Shard:
    """Header of a shard: keys, checksums and the location of the rows.

    Attributes
    ----------
    name : str
        File name.
    first_id : int
        Row id of the first row in this process; the ids of a shard are consecutive.
    keys : list of bytes
        Key of each row.
    checksums : ndarray of shape (n_rows,), uint32
        CRC32 of each row.
    rows_offset : int
        Offset of the first row from the beginning of the file, in bytes.
    row_shape : tuple of int
        Shape of a row.
    dtype : numpy.dtype
        Dtype of the rows.
    size_and_mtime : tuple of two int
        Size in bytes and modification time in nanoseconds of the file.
    shadowed : bool
        Whether some of the keys are read from another shard.
    """

    name: str
    first_id: int
    keys: list[bytes]
    checksums: NDArray[np.uint32]
    rows_offset: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size_and_mtime: tuple[int, int]
    shadowed: bool = False

    def empty_rows(self, n: int) -> NDArray[Any]:
        """Allocate an array for n of its rows."""
        return np.empty((n, *self.row_shape), self.dtype)


def new_shard_name(timestamp: int) -> str:
    """Return a unique name for a shard whose oldest row has a timestamp (ns)."""
    return f"{timestamp:020d}-{uuid.uuid4().hex[:12]}.safetensors"


def shard_timestamp(name: str) -> int:
    """Return the timestamp (ns) that the name of a shard begins with."""
    return int(name.split("-")[0])


def list_shards(folder: Path) -> dict[str, os.stat_result]:
    """Return the name and status of each shard in the folder of a namespace."""
    found: dict[str, os.stat_result] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # Links and pipes are skipped: reading them might block or not end.
                if _SHARD_NAME.fullmatch(entry.name) and entry.is_file(
                    follow_symlinks=False
                ):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat()
    except OSError:  # missing or unreadable folder: there are no rows
        return {}
    return found


def folder_fingerprint(folder: Path) -> tuple[int, ...] | None:
    """Return a value that changes when a file is added to or removed from a folder.

    None if the folder is missing, or changed so recently that another change might
    leave the value as it is.
    """
    try:
        status = os.stat(folder)
    except OSError:
        return None
    if status.st_mtime_ns > time.time_ns() - _MIN_AGE_NS:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def is_store_file(name: str) -> bool:
    """Return whether a file in the folder of a namespace was written by the store."""
    return _STORE_FILE_NAME.fullmatch(name) is not None


def size_and_mtime(status: os.stat_result) -> tuple[int, int]:
    """Return the size in bytes and the modification time in nanoseconds of a file."""
    return status.st_size, status.st_mtime_ns


def read_header(file: BinaryIO, name: str, first_id: int) -> Shard:
    """Read and validate everything but the rows of a shard.

    The safetensors header is parsed here because the safetensors library memory-maps
    files and does not expose the offsets of tensors.

    Parameters
    ----------
    file : binary file
        The open shard.
    name : str
        Its file name.
    first_id : int
        Row id of its first row.

    Returns
    -------
    Shard

    Raises
    ------
    ValueError
        If the file is not a valid shard.
    OSError
        If the file cannot be read.
    """
    status = os.fstat(file.fileno())
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
        shapes_and_offsets = [
            value
            for part in ("keys", "checksums", "rows")
            for value in header[part]["shape"] + header[part]["data_offsets"]
        ]
        if not all(type(value) is int and value >= 0 for value in shapes_and_offsets):
            raise ValueError("its header contains invalid offsets")
        n = header["keys"]["shape"][0]
        spans = {}
        for part, dtype in [("keys", "U8"), ("checksums", "U32"), ("rows", None)]:
            begin, end = (8 + length + at for at in header[part]["data_offsets"])
            if not (
                0 < n == header[part]["shape"][0] and begin < end <= status.st_size
            ):
                raise ValueError("its header does not match its size")
            if dtype not in (None, header[part]["dtype"]):
                raise ValueError(f"its {part} have an invalid dtype")
            spans[part] = (begin, end)
        row_shape = tuple(header["rows"]["shape"][1:])
        row_dtype = np.dtype(DTYPES[header["rows"]["dtype"]])
        begin, end = spans["rows"]
        if (
            not row_shape
            or end - begin != n * math.prod(row_shape) * row_dtype.itemsize
        ):
            raise ValueError("its header is inconsistent")
        keys = _read_span(file, *spans["keys"])
        if len(keys) != n * KEY_BYTES:
            raise ValueError("its keys have an invalid length")
        checksums = np.frombuffer(_read_span(file, *spans["checksums"]), "<u4")
    except (struct.error, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not a valid shard ({type(error).__name__})") from error
    if len(checksums) != n:
        raise ValueError("its checksums have an invalid length")
    return Shard(
        name,
        first_id,
        [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)],
        checksums,
        begin,
        row_shape,
        row_dtype,
        size_and_mtime(status),
    )


def read_rows(file: BinaryIO, shard: Shard, indices: NDArray[np.intp]) -> NDArray[Any]:
    """Read rows of a shard, consecutive ones in one call.

    Parameters
    ----------
    file : binary file
        The open shard.
    shard : Shard
        Its header.
    indices : ndarray of shape (n_rows,)
        Indices of the rows in the shard, in ascending order.

    Returns
    -------
    ndarray of shape (n_rows, ...)

    Raises
    ------
    ValueError
        If the file is truncated.
    OSError
        If the file cannot be read.
    """
    rows = shard.empty_rows(len(indices))
    breaks = (np.flatnonzero(np.diff(indices) != 1) + 1).tolist()
    for begin, end in pairwise([0, *breaks, len(indices)]):
        run = rows[begin:end]
        file.seek(shard.rows_offset + int(indices[begin]) * rows[0].nbytes)
        if file.readinto(run.data.cast("B")) < run.nbytes:  # type: ignore[attr-defined]
            raise ValueError("it is truncated")
    return rows


def _read_span(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    content = file.read(end - begin)
    if len(content) < end - begin:
        raise ValueError("it is truncated")
    return content
