"""What a file of rows looks like, how it comes into being, and how it is read.

A shard is a safetensors file of up to some thousand rows that is written once and never
changed: ``keys`` (n, 32) of the images, ``checksums`` (n,) and ``rows`` (n, ...). It
appears whole, by renaming, or not at all. Its name begins with the moment, in
nanoseconds, of the oldest row in it; a file of another name is not the store's.

It is neither unpickled nor executed, and not mapped into memory: of a mapped file that
another process cuts short, a read is a signal that ends the process; of this it is an
error.
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

_NAME = re.compile(r"\d{20}-[0-9a-f]{12}\.safetensors")
_OURS = re.compile(
    r"\d{20}-[0-9a-f]{12}(\.safetensors|\.corrupt|-[0-9a-f]{12}\.tmp)"
    r"|space(\.json|-[0-9a-f]{12}\.tmp)"
)
KEY_BYTES = 32  # of sha256
DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}  # as safetensors names them
_LONGEST_HEADER = 2**20
_SETTLED_NS = 2_000_000_000  # longer than a tick of any file system's clock


@dataclass(eq=False)
class Shard:
    """Where things lie in a file of n rows."""

    name: str
    first: int  # number of its first row among all rows of its space in this process
    keys: list[bytes]
    checksums: NDArray[np.uint32]
    start: int  # of the rows, in bytes from the beginning of the file
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    signature: tuple[int, int]
    shadowed: bool = False  # whether some of its keys are read from another shard

    def rows_like(self, n: int) -> NDArray[Any]:
        """Make room for n of its rows."""
        return np.empty((n, *self.row_shape), self.dtype)


def new_name(moment: int) -> str:
    """Name a shard whose oldest row is of that moment, in nanoseconds."""
    return f"{moment:020d}-{uuid.uuid4().hex[:12]}.safetensors"


def moment_of(name: str) -> int:
    """Say which moment a name begins with."""
    return int(name.split("-")[0])


def shards_in(folder: Path) -> dict[str, os.stat_result]:
    """List the shards of a space, by name."""
    found: dict[str, os.stat_result] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # No link, no pipe: reading could lead elsewhere, or never end.
                if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        found[entry.name] = entry.stat()
    except OSError:  # not there, or not ours to read: nothing is known
        return {}
    return found


def settled_state(folder: Path) -> tuple[int, ...] | None:
    """Give what changes when a file comes to or goes from a folder, or None.

    None of a folder that changed so lately that it might change once more and look the
    same; or that is not there.
    """
    try:
        status = os.stat(folder)
    except OSError:
        return None
    if status.st_mtime_ns > time.time_ns() - _SETTLED_NS:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def is_ours(name: str) -> bool:
    """Tell whether a file in the folder of a space was written by the store."""
    return _OURS.fullmatch(name) is not None


def signature_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def read_header(file: BinaryIO, name: str, first: int) -> Shard:
    """Read all of a shard but its rows; `name` and `first` as in `Shard`.

    The format is that of safetensors; it is read here since the library maps files
    into memory and does not tell where in them a tensor lies.
    """
    status = os.fstat(file.fileno())
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
        numbers = [
            at
            for part in ("keys", "checksums", "rows")
            for at in header[part]["shape"] + header[part]["data_offsets"]
        ]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("its header has numbers that are none")
        n = header["keys"]["shape"][0]
        tensors = {}
        for part, dtype in [("keys", "U8"), ("checksums", "U32"), ("rows", None)]:
            begin, end = (8 + length + at for at in header[part]["data_offsets"])
            if not (
                0 < n == header[part]["shape"][0] and begin < end <= status.st_size
            ):
                raise ValueError("its header and its size do not agree")
            if dtype not in (None, header[part]["dtype"]):
                raise ValueError(f"its {part} are of another type")
            tensors[part] = (begin, end)
        row_shape = tuple(header["rows"]["shape"][1:])
        row_type = np.dtype(DTYPES[header["rows"]["dtype"]])
        begin, end = tensors["rows"]
        if not row_shape or end - begin != n * math.prod(row_shape) * row_type.itemsize:
            raise ValueError("its header does not agree with itself")
        keys = _part(file, *tensors["keys"])
        if len(keys) != n * KEY_BYTES:
            raise ValueError("its keys are of another length")
        checksums = np.frombuffer(_part(file, *tensors["checksums"]), "<u4")
    except (struct.error, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no shard ({type(error).__name__})") from error
    if len(checksums) != n:
        raise ValueError("its checksums are of another length")
    split = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
    signature = signature_of(status)
    return Shard(name, first, split, checksums, begin, row_shape, row_type, signature)


def read_rows(file: BinaryIO, shard: Shard, rows: NDArray[np.intp]) -> NDArray[Any]:
    """Read some rows of a shard, in ascending order; neighbours in one go."""
    content = shard.rows_like(len(rows))
    breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    for begin, end in pairwise([0, *breaks, len(rows)]):
        part = content[begin:end]
        file.seek(shard.start + int(rows[begin]) * content[0].nbytes)
        if file.readinto(part.data.cast("B")) < part.nbytes:  # type: ignore[attr-defined]
            raise ValueError("it ends too early")
    return content


def _part(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    content = file.read(end - begin)
    if len(content) < end - begin:
        raise ValueError("it ends too early")
    return content
