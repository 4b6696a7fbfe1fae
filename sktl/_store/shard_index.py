"""Where a row is: the shards of one space, and what was read of them before.

==========================  ====================================================
what may happen             what then
==========================  ====================================================
two writers                 each writes shards of its own; no lock is needed, and
                            of a row that both wrote the older is read
shard damaged               its checksums tell; it is put aside as ``.corrupt``
shard not ours to read      left where it is, with a warning
shard gone while reading    it was merged or evicted: looked up again, or computed
==========================  ====================================================

Rows have numbers, in the order in which this process came to know of them: those of a
shard follow each other. So to look up many keys is one look at a dict for each, and
some arithmetic for all.
"""

import bisect
import contextlib
import errno
import itertools
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import save

from sktl._store.row_cache import RowCache
from sktl._store.shard import (
    KEY_BYTES,
    Shard,
    moment_of,
    new_name,
    read_header,
    read_rows,
    settled_state,
    shards_in,
    signature_of,
)
from sktl._utils.files import write_atomically

MERGE_FROM = 4  # shards at least, unless fewer fill a large one
_MANY = 128  # shards, after which larger ones are made of four of them
_LARGEST = 2**26  # bytes of a shard; to merge takes three times that in memory
_STALE = 3600.0  # seconds after which the file of a killed writer is removed
_AT_ONCE = 1024  # rows read, while the same number is checked and copied
_GONE = (errno.ENOENT, errno.ESTALE)  # the second, when another machine removed it


class ShardIndex:
    """The shards of one space, and which row of which shard belongs to a key.

    A process has one of each space, or, if it knows of many spaces, may have let one go
    that a thread still uses: they are to each other as those of two processes. Every
    method may be called by several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, Shard] = {}  # in the order of the numbers of their rows
        self.where: dict[bytes, int] = {}  # the number of the row of a key
        self.row_shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.refused: set[str] = set()  # damaged, and perhaps still there
        self._n_numbers = 0  # given to rows so far
        self._state: tuple[int, ...] | None = None  # of the folder, when last listed
        self._kept = RowCache()
        self._may_merge = True
        # Of the space too, so that a file copied from another one is not believed.
        self._seed = zlib.crc32(folder.name.encode())
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Take notice of shards that came and went."""
        state = settled_state(self.folder)
        if state is not None and state == self._state:
            return  # as most times
        with self._lock:
            listed = shards_in(self.folder).items()
            there = {name: signature_of(status) for name, status in listed}
            self.refused &= there.keys()
            if there != {name: s.signature for name, s in self.shards.items()}:
                shards = self.shards.items()
                self._forget([n for n, s in shards if there.get(n) != s.signature])
                for name in sorted(there.keys() - self.shards.keys() - self.refused):
                    self._load(name)
            complete = there.keys() <= self.shards.keys() | self.refused
            self._state = state if complete else None  # of before it was listed

    def changed(self) -> None:
        """Take notice of what this process did, whatever the folder's clock says."""
        self._state = None
        self.refresh()

    def get(
        self, keys: Sequence[bytes]
    ) -> tuple[NDArray[np.intp], NDArray[Any] | None]:
        """Read the rows that are known; see `FeatureStore.get`."""
        self.refresh()
        places, block = self._kept.lookup(map(self.where.get, keys), len(keys))
        known = places >= 0
        rows: NDArray[Any] | None = None
        for attempt in range(3):  # a shard may be merged or evicted before it is read
            if known.all():
                break
            if attempt:
                self.refresh()
            found = self._locate(keys, np.flatnonzero(~known))
            if not found:
                break
            for shard, wanted, positions in found:
                if rows is None:
                    rows = shard.rows_like(len(keys))
                known[positions] = self._read(shard, wanted, positions, rows)
        positions = np.flatnonzero(known)
        if not len(positions):
            return positions, None
        if rows is None:  # as most times
            return positions, block.take(places[positions], axis=0)
        if len(kept := np.flatnonzero(places >= 0)):
            rows[kept] = block[places[kept]]
        return positions, rows if len(positions) == len(keys) else rows[positions]

    def _locate(
        self, keys: Sequence[bytes], positions: NDArray[np.intp]
    ) -> list[tuple[Shard, NDArray[np.intp], NDArray[np.intp]]]:
        """Give shards, the rows wanted of each in ascending order, and their places."""
        if len(positions) < len(keys):
            keys = [keys[position] for position in positions.tolist()]
        with self._lock:
            found = map(self.where.get, keys, itertools.repeat(-1))
            numbers = np.fromiter(found, np.intp, len(keys))
            shards = list(self.shards.values())
        order = numbers.argsort()
        numbers, positions = numbers[order], positions[order]
        bounds = numbers.searchsorted([shard.first for shard in shards]).tolist()
        spans = itertools.pairwise([*bounds, len(keys)])
        return [
            (shard, numbers[begin:end] - shard.first, positions[begin:end])
            for shard, (begin, end) in zip(shards, spans, strict=True)
            if begin < end
        ]

    def _read(
        self,
        shard: Shard,
        wanted: NDArray[np.intp],
        positions: NDArray[np.intp],
        rows: NDArray[Any],
    ) -> bool:
        """Read rows of one shard into `rows`, unless it is gone or damaged.

        A shard of which one row is wrong is not believed at all.
        """
        distinct, which = np.unique(wanted, return_inverse=True)
        for begin in range(0, len(distinct), _AT_ONCE):
            part = distinct[begin : begin + _AT_ONCE]
            content = self._from_disk(shard, part)
            if content is None:
                return False
            numbers = (part + shard.first).tolist()
            self._kept.add(numbers, content, len(self.where))
            here = slice(*which.searchsorted([begin, begin + _AT_ONCE]))
            rows[positions[here]] = content[which[here] - begin]
        return True

    def _from_disk(self, shard: Shard, rows: NDArray[np.intp]) -> NDArray[Any] | None:
        """Read and check some rows; None if the shard is gone or damaged."""
        try:
            with open(self.folder / shard.name, "rb") as file:
                content = read_rows(file, shard, rows)
            self._check(shard, rows, content)
        except (OSError, ValueError) as error:
            self._refuse(shard.name, error)
            return None
        return content

    def n_intact(self, shard: Shard) -> int:
        """Read all of a shard; give the number of its rows, or 0 if one is wrong."""
        n = len(shard.keys)
        for begin in range(0, n, _AT_ONCE):
            rows = np.arange(begin, min(begin + _AT_ONCE, n))
            if self._from_disk(shard, rows) is None:
                return 0
        return n

    def write(self, keys: Sequence[bytes], rows: NDArray[Any], moment: int) -> None:
        """Write a shard of distinct keys; `moment` (ns) decides which is the oldest."""
        rows = np.ascontiguousarray(rows)
        self._write(keys, rows, np.array(self._checksums(keys, rows)), moment)

    def _write(
        self,
        keys: Sequence[bytes],
        rows: NDArray[Any],
        checksums: NDArray[Any],
        moment: int,
    ) -> None:
        tensors: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "checksums": checksums.astype(np.uint32),
            "rows": rows,
        }
        write_atomically(self.folder / new_name(moment), save(tensors))
        self.changed()

    def merge(self, most: int) -> None:
        """Make one shard of at most `most` bytes of small ones, if there are many.

        Of more bytes in a space that would have too many shards. Unless somebody else
        is doing it, or the file system has no locks.
        """
        most = self._limit(most)
        if not self._may_merge or not self._small(most):
            return
        lock = FileLock(self.folder / "merge.lock", timeout=0)
        with contextlib.suppress(Timeout, NotImplementedError), self._lock, lock:
            self._remove_stale()
            self.refresh()  # somebody else may have done it just before
            self._merge(self._small(most))

    def _limit(self, most: int) -> int:
        """Give a larger limit for a large space: each look lists all of its shards.

        In steps of four, so that a row is written again seldom.
        """
        with self._lock:
            total = sum(shard.signature[0] for shard in self.shards.values())
        while 0 < most < _LARGEST // 4 and total > _MANY * most:
            most *= 4
        return most

    def _small(self, most: int) -> list[Shard]:
        """Those to merge: enough to fill a large one, or several alike, or none.

        The largest of several is no larger than the others together. So each time a row
        is written again, its shard is at least twice the size: that is seldom. And what
        is left is few: all but the smallest are larger than those below them together.
        """
        with self._lock:
            shards = sorted(self.shards.values(), key=lambda shard: shard.signature[0])
        chosen: list[Shard] = []
        alike = total = 0
        for n, shard in enumerate(shards, 1):
            size = shard.signature[0]
            if size > most // 2:
                break
            if total + size > most:
                return chosen
            if n >= MERGE_FROM and size <= total:
                alike = n
            chosen.append(shard)
            total += size
        return chosen[:alike]

    def _merge(self, shards: Sequence[Shard]) -> None:
        keys: list[bytes] = []
        checksums: list[NDArray[Any]] = []
        parts: list[NDArray[Any]] = []
        for shard in shards:
            # Only the rows that are read from this shard: should another have the
            # same key, the one that won so far wins on.
            numbers = enumerate(shard.keys, shard.first)
            own = [n - shard.first for n, key in numbers if self.where.get(key) == n]
            if not own:
                continue
            rows = np.array(own, dtype=np.intp)
            content = self._from_disk(shard, rows)
            if content is None:
                return  # it went or is damaged: next time, without it
            keys += [shard.keys[row] for row in own]
            checksums.append(shard.checksums[rows])
            parts.append(content)
        if keys:
            moment = min(moment_of(shard.name) for shard in shards)
            self._write(keys, np.concatenate(parts), np.concatenate(checksums), moment)
        try:
            for shard in shards:
                (self.folder / shard.name).unlink(missing_ok=True)
        except PermissionError:
            # Of other users, who share a directory such as /tmp. What was merged is
            # there twice now; to go on would make it ever more.
            self._may_merge = False
        self.changed()

    def _remove_stale(self) -> None:
        # One folder up too: the tag of the whole store is written there.
        for file in [*self.folder.glob("*.tmp"), *self.folder.parent.glob("*.tmp")]:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if time.time() - file.stat().st_mtime > _STALE:
                    file.unlink()

    def _load(self, name: str) -> None:
        try:
            with open(self.folder / name, "rb") as file:
                shard = read_header(file, name, self._n_numbers)
                # So that the shape of a file of another space is not taken for ours.
                row = np.zeros(1, dtype=np.intp)
                self._check(shard, row, read_rows(file, shard, row))
            if not self.shards:
                self.row_shape, self.dtype = shard.row_shape, shard.dtype
            if (shard.row_shape, shard.dtype) != (self.row_shape, self.dtype):
                raise ValueError("its rows are unlike those of the other files")
        except (OSError, ValueError) as error:
            self._refuse(name, error)
            return
        self._n_numbers += len(shard.keys)
        self.shards[name] = shard
        self._enter(shard)

    def _enter(self, shard: Shard) -> None:
        """Let its keys be read from this shard, but for those that an older one has."""
        shard.shadowed = False
        numbers = range(shard.first, shard.first + len(shard.keys))
        if self.where.keys().isdisjoint(shard.keys):
            self.where.update(zip(shard.keys, numbers, strict=True))
            return
        shards = list(self.shards.values())
        firsts = [each.first for each in shards]
        for key, number in zip(shard.keys, numbers, strict=True):
            had = self.where.setdefault(key, number)
            other = shards[bisect.bisect(firsts, had) - 1]
            if shard.name < other.name:
                self.where[key] = number
                other.shadowed = True
            elif other is not shard:
                shard.shadowed = True

    def _forget(self, names: Iterable[str]) -> None:
        gone = [self.shards[name] for name in names if name in self.shards]
        for shard in gone:
            for number, key in enumerate(shard.keys, shard.first):
                if self.where.get(key) == number:
                    del self.where[key]
            del self.shards[shard.name]  # last, lest Ctrl-C leave numbers of no shard
        if not self.shards:
            self._kept.clear()
        if gone:  # what was read from them may be in another as well
            for shard in self.shards.values():
                if shard.shadowed:
                    self._enter(shard)

    def _refuse(self, name: str, error: Exception) -> None:
        """Use a shard no more; put it aside if it is what is wrong."""
        with self._lock:
            self._forget([name])
            if isinstance(error, OSError) and error.errno in _GONE:
                self._state = None  # list again: it may be there after all
                return
            self.refused.add(name)
        file = self.folder / name
        said, aside = "cannot be read", "left where it is"
        if isinstance(error, ValueError):
            said = "is damaged"
            with contextlib.suppress(OSError):  # a directory that cannot be written
                file.rename(file.with_suffix(".corrupt"))
                aside = "put aside as .corrupt"
        warnings.warn(
            f"The file {str(file)!r} of a feature store {said}: {error}. It was "
            f"{aside}, and its rows are computed again.",
            UserWarning,
            stacklevel=2,
        )

    def _check(
        self, shard: Shard, rows: NDArray[np.intp], content: NDArray[Any]
    ) -> None:
        keys = [shard.keys[row] for row in rows.tolist()]
        expected = shard.checksums[rows].tolist()
        if self._checksums(keys, content) != expected:
            raise ValueError("the checksum of a row is wrong")
        if not np.isfinite(content).all():
            raise ValueError("it has NaN or infinity")

    def _checksums(self, keys: Sequence[bytes], rows: NDArray[Any]) -> list[int]:
        crc32, seed = zlib.crc32, self._seed
        return [
            crc32(row, crc32(key, seed)) for key, row in zip(keys, rows, strict=True)
        ]
