"""Where a row is: the shards of one space, and what was read of them before.

==========================  ====================================================
what may happen             what then
==========================  ====================================================
two writers                 each writes shards of its own; no lock is needed, and
                            of a row that both wrote the older is read
shard damaged               its checksums tell; it is put aside as ``.corrupt``
shard gone while reading    it was merged or evicted: looked up again, or computed
==========================  ====================================================
"""

import contextlib
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import save

from sktl._shard import (
    KEY_BYTES,
    SUFFIX,
    Kept,
    Shard,
    read_header,
    shards_in,
    signature_of,
    write_whole,
)

MERGE_FROM = 16  # shards that are small enough
_STALE = 3600.0  # seconds after which the file of a killed writer is removed
MOST_KEPT = 2**28  # bytes of rows of one space in memory


class ShardIndex:
    """The shards of one space, and which row of which shard belongs to a key.

    One per process and space; every method may be called by several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, Shard] = {}
        self.where: dict[bytes, tuple[str, int]] = {}
        self.row_shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.refused: set[str] = set()  # damaged, and perhaps still there
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Take notice of shards that came and went."""
        with self._lock:
            listed = shards_in(self.folder).items()
            there = {name: signature_of(status) for name, status in listed}
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
        kept = self._keep(shard)
        in_shard, positions = places.T
        try:
            self._fill(kept, name, shard, in_shard[~kept.checked[in_shard]])
        except FileNotFoundError:
            return places[:0, 1]
        except (OSError, ValueError) as error:
            self._refuse(name, error)
            return places[:0, 1]
        rows[positions] = kept.rows[in_shard]
        return positions

    def _keep(self, shard: Shard) -> Kept:
        if shard.kept is not None:
            return shard.kept
        # np.empty takes no memory for rows that are never read into it.
        rows = np.empty((len(shard.keys), *shard.row_shape), shard.dtype)
        with self._lock:
            total = sum(s.kept.rows.nbytes for s in self.shards.values() if s.kept)
            if total + rows.nbytes > MOST_KEPT:
                for other in self.shards.values():
                    other.kept = None
            shard.kept = kept = Kept(rows, np.zeros(len(rows), dtype=bool))
        return kept

    def _fill(
        self, kept: Kept, name: str, shard: Shard, rows: NDArray[np.intp]
    ) -> None:
        if not len(rows):
            return
        with open(self.folder / name, "rb", buffering=0) as file:
            for row in rows.tolist():
                # Not at once into `kept`: another thread may have read it there.
                content = np.empty(shard.row_shape, shard.dtype)
                self._read_row(file, shard, row, content)
                kept.rows[row] = content
                kept.checked[row] = True

    def _read_row(
        self, file: BinaryIO, shard: Shard, row: int, out: NDArray[Any]
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
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "checksums": np.array(checksums, dtype=np.uint32),
            "rows": rows,
        }
        name = f"{moment:020d}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        write_whole(self.folder / name, save(tensors))
        self.refresh()

    def merge(self, most: int) -> None:
        """Make one shard of many small ones, unless somebody else is doing it."""
        listed = shards_in(self.folder).items()
        sizes = {name: status.st_size for name, status in listed}
        small, total = [], 0
        for name in sorted(self.shards.keys() & sizes):
            if sizes[name] <= most // 2 and total + sizes[name] <= most:
                small.append(name)
                total += sizes[name]
        if len(small) < MERGE_FROM:
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
                if len(self.read(name, pairs(own), rows)) < len(own):
                    return  # it went or is damaged: next time, without it
                keys += [shard.keys[row] for row in own]
                parts.append(rows)
            if keys:
                self.write(keys, np.concatenate(parts), int(names[0].split("-")[0]))
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            self.refresh()

    def _remove_stale(self) -> None:
        # One folder up too: the tag of the whole store is written there.
        for file in [*self.folder.glob("*.tmp"), *self.folder.parent.glob("*.tmp")]:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()

    def _load(self, name: str) -> None:
        try:
            with open(self.folder / name, "rb") as file:
                shard = read_header(file)
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


def pairs(rows: Sequence[int]) -> NDArray[np.intp]:
    """Pairs (row in a shard, position in a result) for rows that are read in order."""
    return np.array([(row, i) for i, row in enumerate(rows)], np.intp).reshape(-1, 2)
