"""Rows remembered per picture, on disk, shared by processes and machines.

A store is a directory of *spaces*, one for each way of computing rows, and a space is a
directory of *shards*: safetensors files of up to some thousand rows that are written
once and never changed. Each row lies beside the key of its picture and a checksum.

==========================  ====================================================
what may happen             what then
==========================  ====================================================
killed while writing        a shard appears whole, by renaming, or not at all
two writers                 each writes shards of its own; no lock is needed, and
                            of a row that both wrote the older is read
shard damaged               its checksums tell; it is put aside as ``.corrupt``
shard gone while reading    it was merged or evicted: looked up again, or computed
disk full, read-only        one warning; what is there is still read
==========================  ====================================================

Nothing in here is ever executed or unpickled, and nothing is held open or mapped into
memory, so that a file which another process cuts short gives an error and no signal.
The layout follows what was learnt from git's packs: immutable files, merged by whoever
happens to have time.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import save

Space = Mapping[str, str]

_VERSION = "sktl-store-1"  # of the layout; another one is another directory
_KEY_BYTES = 32  # of sha256
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}  # as safetensors names them
_MERGE_FROM = 16  # shards that are small enough
_MERGED_BYTES = 2**26  # no shard grows beyond it by merging
_LONGEST_HEADER = 2**20
_STALE = 3600.0  # seconds after which the file of a killed writer is removed
_CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n"  # bford.info/cachedir


class FeatureStore:
    """Remember on disk what a network computed of each picture.

    Give it, or just its directory, to ``memory`` of an estimator: each picture then
    goes through the network once, whatever folds, candidates, processes and sessions
    it turns up in. One directory may serve many networks and several machines.

    Parameters
    ----------
    directory : str or path-like
        Where the rows are kept. It is made when the first row is written.
    max_bytes : int or None, default=None
        Size that the rows on disk may have; above it the oldest are deleted. None sets
        no limit.

    Raises
    ------
    ValueError
        If `max_bytes` is not positive.

    See Also
    --------
    PretrainedFeatures : Has a parameter ``memory`` that takes one.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import FeatureStore, PretrainedFeatures
    >>> photographs = load_sample_images().images
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     store = FeatureStore(directory)
    ...     features = PretrainedFeatures("resnet_mini", memory=store)
    ...     rows = features.fit_transform(photographs)
    ...     store.info()["rows"]
    2
    """

    def __init__(
        self, directory: str | os.PathLike[str], max_bytes: int | None = None
    ) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be positive, or None for no limit. Got {max_bytes!r}."
            )
        self.directory = directory
        self.max_bytes = max_bytes

    def __repr__(self) -> str:
        """Show the directory."""
        limit = "" if self.max_bytes is None else f", max_bytes={self.max_bytes}"
        return f"{type(self).__name__}({os.fspath(self.directory)!r}{limit})"

    def get(
        self, space: Space, keys: Sequence[bytes]
    ) -> tuple[NDArray[np.intp], NDArray[Any] | None]:
        """Read the rows that are known.

        Parameters
        ----------
        space : mapping of str to str
            All that decides a row besides the picture, by name.
        keys : sequence of bytes
            32 bytes for each picture, such as a sha256 of its content.

        Returns
        -------
        positions : ndarray of shape (n_known,)
            Where in `keys` those stand whose rows are known, ascending.
        rows : ndarray of shape (n_known, ...), or None
            Their rows; None where none is known.

        Raises
        ------
        ValueError
            If the directory of the store is a file.
        """
        index = self._index(space)
        rows: NDArray[Any] | None = None
        known = np.zeros(len(keys), dtype=bool)
        for _ in range(3):  # a shard may be merged or evicted between look and read
            index.refresh()
            wanted = index.locate(keys, np.flatnonzero(~known))
            if not wanted:
                break
            if rows is None:
                rows = np.empty((len(keys), *index.row_shape), dtype=index.dtype)
            for name, places in wanted.items():
                known[index.read(name, places, rows)] = True
        positions = np.flatnonzero(known)
        if rows is None or not len(positions):
            return positions, None
        return positions, rows if len(positions) == len(keys) else rows[positions]

    def known(self, space: Space) -> Mapping[bytes, object]:
        """Look up which rows there are now, those of other processes included.

        Parameters
        ----------
        space : mapping of str to str
            As in `get`.

        Returns
        -------
        mapping
            Its keys are those of the rows. Not to be changed.
        """
        index = self._index(space)
        index.refresh()
        return index.where

    def put(self, space: Space, keys: Sequence[bytes], rows: NDArray[Any]) -> None:
        """Remember rows; those that are known already stay as they are.

        It never fails because of the disk: what cannot be written is not remembered,
        with one warning.

        Parameters
        ----------
        space : mapping of str to str
            As in `get`.
        keys : sequence of bytes
            32 bytes for each row.
        rows : ndarray of shape (len(keys), ...)
            Of float16, float32 or float64, all values finite.

        Raises
        ------
        ValueError
            If the rows are not such an array, differ in shape from those of the space,
            or the directory of the store is a file.
        """
        index = self._index(space)
        _check_rows(keys, rows)
        index.refresh()
        if index.where and (rows.shape[1:], rows.dtype) != (
            index.row_shape,
            index.dtype,
        ):
            raise ValueError(
                f"All rows of a space must be alike. It has rows of shape "
                f"{index.row_shape} and {index.dtype}. Got {rows.shape[1:]} and "
                f"{rows.dtype}. Say in `space` what makes the difference."
            )
        new = {key: i for i, key in enumerate(keys) if key not in index.where}
        if not new:
            return
        try:
            self._make(index, space)
            index.write(list(new), rows[list(new.values())], time.time_ns())
            index.merge(self._merged_bytes())
            self._evict()
        except OSError as error:
            _warn_once(
                self._root(),
                f"The feature store {str(self.directory)!r} cannot be written: {error} "
                "Results are right, but not remembered. Free space, or choose a "
                "directory that can be written, for memory.",
            )
        else:
            _warned.discard(self._root())

    def info(self) -> dict[str, Any]:
        """Say what is in the store.

        Returns
        -------
        dict
            ``"rows"`` and ``"bytes"`` of the whole, and ``"spaces"``: by a readable
            name, a dict with ``"rows"``, ``"bytes"`` and ``"space"``, its description.
        """
        spaces: dict[str, dict[str, Any]] = {}
        for index in self._indexes():
            index.refresh()
            description = _description(index.folder)
            name = ", ".join(v if len(v) <= 32 else v[:8] for v in description.values())
            spaces[f"{name} [{index.folder.name[:8]}]"] = {
                "rows": len(index.where),
                "bytes": sum(s.st_size for _, s in _shards(index.folder)),
                "space": description,
            }
        total = {
            unit: sum(space[unit] for space in spaces.values())
            for unit in ("rows", "bytes")
        }
        return {**total, "spaces": spaces}

    def verify(self) -> dict[str, int]:
        """Read every row and compare its checksum.

        Returns
        -------
        dict
            ``"rows"`` that are as they were written, and ``"corrupt"``, the number of
            shards that were not and have been put aside.
        """
        intact = corrupt = 0
        for seen in self._indexes():
            index = _Index(seen.folder)  # that believes the disk only
            index.refresh()
            corrupt += len(index.refused)
            for name, shard in list(index.shards.items()):
                rows = np.empty((len(shard.keys), *index.row_shape), index.dtype)
                good = len(index.read(name, _pairs(range(len(rows))), rows))
                intact += good
                corrupt += good < len(rows)
        return {"rows": intact, "corrupt": corrupt}

    def clear(self) -> None:
        """Delete every row, and nothing that is not the store's.

        Raises
        ------
        OSError
            If a file cannot be deleted.
        """
        for index in self._indexes():
            for file in index.folder.iterdir():
                if file.suffix in (".safetensors", ".tmp", ".corrupt", ".json"):
                    file.unlink(missing_ok=True)
            index.refresh()

    def _root(self) -> Path:
        return Path(os.path.abspath(self.directory)) / _VERSION

    def _index(self, space: Space) -> "_Index":
        root = self._root()
        if root.parent.exists() and not root.parent.is_dir():
            raise ValueError(
                f"memory must be a directory, or one that can be made. Got "
                f"{str(self.directory)!r}, which is a file. Choose another name."
            )
        text = json.dumps(dict(space), sort_keys=True)
        return _index_of(root / hashlib.sha256(text.encode()).hexdigest())

    def _indexes(self) -> list["_Index"]:
        with contextlib.suppress(FileNotFoundError):
            return [_index_of(f) for f in sorted(self._root().iterdir()) if f.is_dir()]
        return []

    def _make(self, index: "_Index", space: Space) -> None:
        description = index.folder / "space.json"
        if description.exists():
            return
        index.folder.mkdir(parents=True, exist_ok=True)
        _write(self._root() / "CACHEDIR.TAG", _CACHE_TAG.encode())
        _write(description, json.dumps(dict(space), indent=1).encode())

    def _merged_bytes(self) -> int:
        # Small enough that deleting the oldest shard does not empty the store.
        return min(_MERGED_BYTES, (self.max_bytes or 8 * _MERGED_BYTES) // 8)

    def _evict(self) -> None:
        if self.max_bytes is None:
            return
        shards = [shard for i in self._indexes() for shard in _shards(i.folder)]
        excess = sum(status.st_size for _, status in shards) - self.max_bytes
        for file, status in sorted(shards, key=lambda shard: shard[0].name):
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= status.st_size


@dataclass(frozen=True)
class _Shard:
    """Where things lie in a file of n rows."""

    keys: list[bytes]
    checksums: NDArray[np.uint32]
    start: int  # of the rows, in bytes from the beginning of the file
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    signature: tuple[int, int]


class _Index:
    """The shards of one space, and which row of which shard belongs to a key.

    One per process and space; every method may be called by several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, _Shard] = {}
        self.where: dict[bytes, tuple[str, int]] = {}
        self.row_shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.refused: set[str] = set()  # damaged, and perhaps still there
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Take notice of shards that came and went."""
        with self._lock:
            there = {f.name: _signature(status) for f, status in _shards(self.folder)}
            self.refused &= there.keys()
            shards = self.shards.items()
            gone = [name for name, s in shards if there.get(name) != s.signature]
            if gone:
                for name in gone:
                    del self.shards[name]
                self.where = {}
                for name in sorted(self.shards):
                    self._enter(name)
            for name in sorted(there.keys() - self.shards.keys() - self.refused):
                self._load(name)

    def locate(
        self, keys: Sequence[bytes], positions: NDArray[np.intp]
    ) -> dict[str, NDArray[np.intp]]:
        """Give, by shard, pairs (row in the shard, position in `keys`)."""
        found: dict[str, list[tuple[int, int]]] = {}
        where = self.where
        for position in positions.tolist():
            if (place := where.get(keys[position])) is not None:
                found.setdefault(place[0], []).append((place[1], position))
        return {name: np.array(sorted(pairs)) for name, pairs in found.items()}

    def read(
        self, name: str, places: NDArray[np.intp], rows: NDArray[Any]
    ) -> NDArray[np.intp]:
        """Read rows of one shard into `rows`; give the positions that are right.

        A shard of which one row is wrong is not believed at all.
        """
        shard = self.shards.get(name)
        if shard is None:  # another thread noticed that it went
            return places[:0, 1]
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                for row, position in places.tolist():
                    self._read_row(file, shard, row, rows[position])
        except FileNotFoundError:
            return places[:0, 1]
        except (OSError, ValueError) as error:
            self._refuse(name, error)
            return places[:0, 1]
        return places[:, 1]

    def _read_row(
        self, file: BinaryIO, shard: _Shard, row: int, out: NDArray[Any]
    ) -> None:
        file.seek(shard.start + row * out.nbytes)
        content = out.data.cast("B")
        read: int = file.readinto(content)  # type: ignore[attr-defined]
        if read < len(content):
            raise ValueError("it ends too early")
        if self._checksum(shard.keys[row], out) != shard.checksums[row]:
            raise ValueError(f"the checksum of row {row} is wrong")
        if not np.isfinite(out).all():
            raise ValueError(f"row {row} has NaN or infinity")

    def write(self, keys: list[bytes], rows: NDArray[Any], moment: int) -> None:
        """Write a shard of distinct keys; `moment` (ns) decides which is the oldest."""
        rows = np.ascontiguousarray(rows)
        checksums = [self._checksum(*pair) for pair in zip(keys, rows, strict=True)]
        tensors: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES),
            "checksums": np.array(checksums, dtype=np.uint32),
            "rows": rows,
        }
        name = f"{moment:020d}-{uuid.uuid4().hex[:12]}.safetensors"
        _write(self.folder / name, save(tensors))
        self.refresh()

    def merge(self, most: int) -> None:
        """Make one shard of many small ones, unless somebody else is doing it."""
        sizes = {file.name: status.st_size for file, status in _shards(self.folder)}
        small, total = [], 0
        for name in sorted(self.shards.keys() & sizes):
            if sizes[name] <= most // 2 and total + sizes[name] <= most:
                small.append(name)
                total += sizes[name]
        if len(small) < _MERGE_FROM:
            return
        try:
            with FileLock(self.folder / "merge.lock", timeout=0):
                self._remove_stale()
                self._merge(small)
        except Timeout:
            return

    def _merge(self, names: list[str]) -> None:
        with self._lock:
            keys: list[bytes] = []
            parts: list[NDArray[Any]] = []
            for name in names:
                # Only the rows that are read from this shard: should another have the
                # same key, the one that won so far wins on.
                shard = self.shards[name]
                places = enumerate(shard.keys)
                own = [row for row, key in places if self.where[key] == (name, row)]
                rows = np.empty((len(own), *self.row_shape), self.dtype)
                if len(self.read(name, _pairs(own), rows)) < len(own):
                    return  # it went or is damaged: next time, without it
                keys += [shard.keys[row] for row in own]
                parts.append(rows)
            if keys:
                self.write(keys, np.concatenate(parts), int(names[0].split("-")[0]))
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            self.refresh()

    def _remove_stale(self) -> None:
        for file in self.folder.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()

    def _load(self, name: str) -> None:
        try:
            with open(self.folder / name, "rb") as file:
                shard = _read_header(file)
            if not self.shards:
                self.row_shape, self.dtype = shard.row_shape, shard.dtype
            if (shard.row_shape, shard.dtype) != (self.row_shape, self.dtype):
                raise ValueError("its rows are unlike those of the other files")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._refuse(name, error)
            return
        self.shards[name] = shard
        self._enter(name)

    def _enter(self, name: str) -> None:
        for row, key in enumerate(self.shards[name].keys):
            place = self.where.setdefault(key, (name, row))
            if name < place[0]:
                self.where[key] = (name, row)

    def _refuse(self, name: str, error: Exception) -> None:
        with self._lock:
            self.refused.add(name)
            if self.shards.pop(name, None) is not None:
                self.where = {}
                for other in sorted(self.shards):
                    self._enter(other)
        file = self.folder / name
        aside = "left where it is"
        with contextlib.suppress(OSError):  # a directory that cannot be written
            file.rename(file.with_suffix(".corrupt"))
            aside = "put aside as .corrupt"
        warnings.warn(
            f"The file {str(file)!r} of a feature store is damaged: {error}. It was "
            f"{aside}, and its rows are computed again.",
            UserWarning,
            stacklevel=2,
        )

    def _checksum(self, key: bytes, row: NDArray[Any]) -> int:
        # Of the space too, so that a file copied from another one is not believed.
        seed = zlib.crc32(key, zlib.crc32(self.folder.name.encode()))
        return zlib.crc32(row.data.cast("B"), seed)


_indexes: dict[Path, _Index] = {}
_indexes_lock = threading.Lock()
_warned: set[Path] = set()


def _index_of(folder: Path) -> _Index:
    with _indexes_lock:
        return _indexes.setdefault(folder, _Index(folder))


def _pairs(rows: Sequence[int]) -> NDArray[np.intp]:
    """Pairs (row in a shard, position in a result) for rows that are read in order."""
    return np.array([(row, i) for i, row in enumerate(rows)], np.intp).reshape(-1, 2)


def _warn_once(root: Path, message: str) -> None:
    if root not in _warned:
        _warned.add(root)
        warnings.warn(message, UserWarning, stacklevel=3)


def _check_rows(keys: Sequence[bytes], rows: NDArray[Any]) -> None:
    if any(len(key) != _KEY_BYTES for key in keys):
        raise ValueError(f"A key must have {_KEY_BYTES} bytes, such as a sha256.")
    if (
        rows.ndim < 2
        or len(keys) != len(rows)
        or rows.dtype.str not in _DTYPES.values()
    ):
        raise ValueError(
            f"rows must be an array of floats with a row for each of {len(keys)} keys. "
            f"Got shape {rows.shape} and {rows.dtype}."
        )
    if not np.isfinite(rows).all():
        raise ValueError("rows must be finite. Got NaN or infinity.")


def _shards(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """List the shards of a space."""
    found: list[tuple[Path, os.stat_result]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # No link, no pipe: reading could lead elsewhere, or never end.
                if entry.name.endswith(".safetensors"):
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            found.append((Path(entry.path), entry.stat()))
    except OSError:  # not there, or not ours to read: nothing is known
        return []
    return found


def _signature(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _description(folder: Path) -> dict[str, str]:
    try:
        return {
            k: str(v)
            for k, v in json.loads((folder / "space.json").read_text()).items()
        }
    except (OSError, ValueError, AttributeError):
        return {"unknown": "unknown"}


def _write(file: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, after a power cut too."""
    partial = file.with_name(f"{file.stem}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(partial, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _read_header(file: BinaryIO) -> _Shard:
    """Read all of a shard but its rows.

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
        for name, dtype in [("keys", "U8"), ("checksums", "U32"), ("rows", None)]:
            begin, end = (8 + length + at for at in header[name]["data_offsets"])
            if not (
                0 < n == header[name]["shape"][0] and begin < end <= status.st_size
            ):
                raise ValueError("its header and its size do not agree")
            if dtype not in (None, header[name]["dtype"]):
                raise ValueError(f"its {name} are of another type")
            tensors[name] = (begin, end)
        row_shape = tuple(header["rows"]["shape"][1:])
        row_type = np.dtype(_DTYPES[header["rows"]["dtype"]])
        begin, end = tensors["rows"]
        if not row_shape or end - begin != n * math.prod(row_shape) * row_type.itemsize:
            raise ValueError("its header does not agree with itself")
        keys = _part(file, *tensors["keys"])
        if len(keys) != n * _KEY_BYTES:
            raise ValueError("its keys are of another length")
        checksums = np.frombuffer(_part(file, *tensors["checksums"]), "<u4")
    except (struct.error, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no shard ({type(error).__name__})") from error
    if len(checksums) != n:
        raise ValueError("its checksums are of another length")
    split = [keys[i : i + _KEY_BYTES] for i in range(0, len(keys), _KEY_BYTES)]
    return _Shard(split, checksums, begin, row_shape, row_type, _signature(status))


def _part(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    content = file.read(end - begin)
    if len(content) < end - begin:
        raise ValueError("it ends too early")
    return content
