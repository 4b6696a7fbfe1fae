"""Index of one namespace: which row of which shard belongs to a key.

==========================  ====================================================
event                       behaviour
==========================  ====================================================
two writers                 each writes its own shards, so that no lock is needed;
                            of a row written by both, the older one is read
shard damaged               detected by checksums; renamed to ``.corrupt``
shard unreadable            left in place, with a warning
shard deleted while         it was merged or evicted: the row is looked up again,
reading                     or computed
==========================  ====================================================

Row ids number the rows in the order in which this process discovered them; the ids of a
shard are consecutive. Looking up many keys therefore takes one dict lookup for each
key, and vectorized arithmetic for the rest.
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
    folder_fingerprint,
    list_shards,
    new_shard_name,
    read_header,
    read_rows,
    shard_timestamp,
    size_and_mtime,
)
from sktl._utils.files import write_atomically

MIN_SHARDS_TO_MERGE = 4  # unless fewer fill a shard of the largest size
_MANY_SHARDS = 128  # when reached, the size limit of merged shards is raised fourfold
_MAX_SHARD_BYTES = 2**26  # merging takes three times as much memory
_STALE_SECONDS = 3600.0  # age at which temporary files of killed writers are deleted
_ROWS_PER_READ = 1024  # rows that are read, verified and copied at a time
_DELETED_ERRNOS = (errno.ENOENT, errno.ESTALE)  # ESTALE: deleted by another machine


class ShardIndex:
    """Index of the shards of one namespace.

    A process has one index for each namespace. If it uses many namespaces, an index may
    be dropped while a thread still uses it; the old and the new index then behave like
    those of two processes. All methods are thread-safe.

    Parameters
    ----------
    folder : Path
        Folder of the namespace.

    Attributes
    ----------
    shards : dict of str to Shard
        Known shards by file name, in ascending order of their row ids.
    row_ids : dict of bytes to int
        Row id of each key.
    row_shape : tuple of int
        Shape of the rows; all rows have the same.
    dtype : numpy.dtype
        Dtype of the rows.
    rejected : set of str
        Names of shards that are damaged or unreadable, and may still be in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, Shard] = {}
        self.row_ids: dict[bytes, int] = {}
        self.row_shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self.rejected: set[str] = set()
        self._next_id = 0
        # Fingerprint of the folder before it was last listed.
        self._fingerprint: tuple[int, ...] | None = None
        self._cache = RowCache()
        self._merge_enabled = True
        # Checksums depend on the namespace, so that a shard copied from another
        # namespace is detected.
        self._checksum_seed = zlib.crc32(folder.name.encode())
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Update the index with shards that were added or removed."""
        fingerprint = folder_fingerprint(self.folder)
        if fingerprint is not None and fingerprint == self._fingerprint:
            return  # the most frequent case
        with self._lock:
            listed = list_shards(self.folder).items()
            found = {name: size_and_mtime(status) for name, status in listed}
            self.rejected &= found.keys()
            known = {name: s.size_and_mtime for name, s in self.shards.items()}
            if found != known:
                self._remove_shards([n for n in known if found.get(n) != known[n]])
                for name in sorted(found.keys() - self.shards.keys() - self.rejected):
                    self._load_shard(name)
            complete = found.keys() <= self.shards.keys() | self.rejected
            self._fingerprint = fingerprint if complete else None

    def force_refresh(self) -> None:
        """Update the index after a change by this process.

        Lists the folder even if its modification time does not show the change.
        """
        self._fingerprint = None
        self.refresh()

    def get(
        self, keys: Sequence[bytes]
    ) -> tuple[NDArray[np.intp], NDArray[Any] | None]:
        """Read the stored rows of some keys; see `FeatureStore.get`."""
        self.refresh()
        slots, buffer = self._cache.lookup(map(self.row_ids.get, keys), len(keys))
        found = slots >= 0
        rows: NDArray[Any] | None = None
        for attempt in range(3):  # a shard may be merged or evicted before it is read
            if found.all():
                break
            if attempt:
                self.refresh()
            located = self._locate(keys, np.flatnonzero(~found))
            if not located:
                break
            for shard, indices, positions in located:
                if rows is None:
                    rows = shard.empty_rows(len(keys))
                found[positions] = self._read_shard(shard, indices, positions, rows)
        positions = np.flatnonzero(found)
        if not len(positions):
            return positions, None
        if rows is None:  # all rows are cached, the most frequent case
            return positions, buffer.take(slots[positions], axis=0)
        if len(cached := np.flatnonzero(slots >= 0)):
            rows[cached] = buffer[slots[cached]]
        return positions, rows if len(positions) == len(keys) else rows[positions]

    def _locate(
        self, keys: Sequence[bytes], positions: NDArray[np.intp]
    ) -> list[tuple[Shard, NDArray[np.intp], NDArray[np.intp]]]:
        """Find the shards that hold the keys at some positions.

        Returns
        -------
        list of (shard, indices, positions)
            For each shard the indices of the rows to read, in ascending order, and the
            positions of their keys.
        """
        if len(positions) < len(keys):
            keys = [keys[position] for position in positions.tolist()]
        with self._lock:
            found = map(self.row_ids.get, keys, itertools.repeat(-1))
            ids = np.fromiter(found, np.intp, len(keys))
            shards = list(self.shards.values())
        order = ids.argsort()
        ids, positions = ids[order], positions[order]
        bounds = ids.searchsorted([shard.first_id for shard in shards]).tolist()
        spans = itertools.pairwise([*bounds, len(keys)])
        return [
            (shard, ids[begin:end] - shard.first_id, positions[begin:end])
            for shard, (begin, end) in zip(shards, spans, strict=True)
            if begin < end
        ]

    def _read_shard(
        self,
        shard: Shard,
        indices: NDArray[np.intp],
        positions: NDArray[np.intp],
        rows: NDArray[Any],
    ) -> bool:
        """Copy rows of one shard to some positions of `rows`.

        Returns
        -------
        bool
            False if the shard was deleted or is damaged; a shard with a single damaged
            row is rejected as a whole.
        """
        distinct, inverse = np.unique(indices, return_inverse=True)
        for begin in range(0, len(distinct), _ROWS_PER_READ):
            chunk = distinct[begin : begin + _ROWS_PER_READ]
            content = self._read_verified(shard, chunk)
            if content is None:
                return False
            row_ids = (chunk + shard.first_id).tolist()
            self._cache.add(row_ids, content, len(self.row_ids))
            span = slice(*inverse.searchsorted([begin, begin + _ROWS_PER_READ]))
            rows[positions[span]] = content[inverse[span] - begin]
        return True

    def _read_verified(
        self, shard: Shard, indices: NDArray[np.intp]
    ) -> NDArray[Any] | None:
        """Read and verify some rows; None if the shard was deleted or is damaged."""
        try:
            with open(self.folder / shard.name, "rb") as file:
                rows = read_rows(file, shard, indices)
            self._verify(shard, indices, rows)
        except (OSError, ValueError) as error:
            self._reject(shard.name, error)
            return None
        return rows

    def count_intact_rows(self, shard: Shard) -> int:
        """Verify a whole shard; return its number of rows, or 0 if one is damaged."""
        n = len(shard.keys)
        for begin in range(0, n, _ROWS_PER_READ):
            indices = np.arange(begin, min(begin + _ROWS_PER_READ, n))
            if self._read_verified(shard, indices) is None:
                return 0
        return n

    def write(self, keys: Sequence[bytes], rows: NDArray[Any], timestamp: int) -> None:
        """Write a shard of distinct keys; `timestamp` (ns) determines its age."""
        rows = np.ascontiguousarray(rows)
        checksums = np.array(self._checksums(keys, rows))
        self._write_shard(keys, rows, checksums, timestamp)

    def _write_shard(
        self,
        keys: Sequence[bytes],
        rows: NDArray[Any],
        checksums: NDArray[Any],
        timestamp: int,
    ) -> None:
        tensors: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
            "checksums": checksums.astype(np.uint32),
            "rows": rows,
        }
        write_atomically(self.folder / new_shard_name(timestamp), save(tensors))
        self.force_refresh()

    def merge(self, max_bytes: int) -> None:
        """Merge small shards into one of at most `max_bytes`, if there are many.

        The limit is raised for a namespace that would have too many shards. Nothing is
        merged while another thread or process merges, or if the file system does not
        support locks.
        """
        max_bytes = self._merge_limit(max_bytes)
        if not self._merge_enabled or not self._shards_to_merge(max_bytes):
            return
        lock = FileLock(self.folder / "merge.lock", timeout=0)
        with contextlib.suppress(Timeout, NotImplementedError), self._lock, lock:
            self._remove_stale_files()
            self.refresh()  # another process may have merged just before
            self._merge_shards(self._shards_to_merge(max_bytes))

    def _merge_limit(self, max_bytes: int) -> int:
        """Raise the size limit of merged shards for a large namespace.

        Each refresh lists all shards, so that their number must stay small. The limit
        is raised in factors of four, so that rows are seldom written again.
        """
        with self._lock:
            total = sum(shard.size_and_mtime[0] for shard in self.shards.values())
        while 0 < max_bytes < _MAX_SHARD_BYTES // 4 and total > (
            _MANY_SHARDS * max_bytes
        ):
            max_bytes *= 4
        return max_bytes

    def _shards_to_merge(self, max_bytes: int) -> list[Shard]:
        """Choose shards that fill one of `max_bytes`, or several of similar size.

        The largest of several shards is no larger than the others together, so that a
        row ends up in a shard of at least twice the size whenever it is written again,
        which is seldom. Few shards remain: all but the smallest are larger than all
        smaller ones together.
        """
        with self._lock:
            shards = sorted(
                self.shards.values(), key=lambda shard: shard.size_and_mtime[0]
            )
        chosen: list[Shard] = []
        n_similar = total = 0
        for n, shard in enumerate(shards, 1):
            size = shard.size_and_mtime[0]
            if size > max_bytes // 2:
                break
            if total + size > max_bytes:
                return chosen
            if n >= MIN_SHARDS_TO_MERGE and size <= total:
                n_similar = n
            chosen.append(shard)
            total += size
        return chosen[:n_similar]

    def _merge_shards(self, shards: Sequence[Shard]) -> None:
        """Write the rows of some shards to a new one, and delete the old ones."""
        keys: list[bytes] = []
        checksums: list[NDArray[Any]] = []
        parts: list[NDArray[Any]] = []
        for shard in shards:
            # Only rows that are read from this shard: where another shard has the same
            # key, the row that was read so far is kept.
            row_ids = enumerate(shard.keys, shard.first_id)
            own = [
                row_id - shard.first_id
                for row_id, key in row_ids
                if self.row_ids.get(key) == row_id
            ]
            if not own:
                continue
            indices = np.array(own, dtype=np.intp)
            rows = self._read_verified(shard, indices)
            if rows is None:
                return  # deleted or damaged: the next merge does without it
            keys += [shard.keys[index] for index in own]
            checksums.append(shard.checksums[indices])
            parts.append(rows)
        if keys:
            timestamp = min(shard_timestamp(shard.name) for shard in shards)
            self._write_shard(
                keys, np.concatenate(parts), np.concatenate(checksums), timestamp
            )
        try:
            for shard in shards:
                (self.folder / shard.name).unlink(missing_ok=True)
        except PermissionError:
            # Shards of other users, in a shared directory such as /tmp. The merged rows
            # are now stored twice; further merges would add more copies.
            self._merge_enabled = False
        self.force_refresh()

    def _remove_stale_files(self) -> None:
        """Delete temporary files of killed writers."""
        # Also in the parent folder, where the tag of the whole store is written.
        for file in [*self.folder.glob("*.tmp"), *self.folder.parent.glob("*.tmp")]:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()

    def _load_shard(self, name: str) -> None:
        """Read the header of a shard and add its keys to the index, or reject it."""
        try:
            with open(self.folder / name, "rb") as file:
                shard = read_header(file, name, self._next_id)
                # Verify one row, so that a shard of another namespace cannot determine
                # the shape of the rows.
                first = np.zeros(1, dtype=np.intp)
                self._verify(shard, first, read_rows(file, shard, first))
            if not self.shards:
                self.row_shape, self.dtype = shard.row_shape, shard.dtype
            if (shard.row_shape, shard.dtype) != (self.row_shape, self.dtype):
                raise ValueError(
                    "its rows differ in shape or dtype from those of the other files"
                )
        except (OSError, ValueError) as error:
            self._reject(name, error)
            return
        self._next_id += len(shard.keys)
        self.shards[name] = shard
        self._add_keys(shard)

    def _add_keys(self, shard: Shard) -> None:
        """Let keys point to this shard, except those that an older shard has."""
        shard.shadowed = False
        row_ids = range(shard.first_id, shard.first_id + len(shard.keys))
        if self.row_ids.keys().isdisjoint(shard.keys):
            self.row_ids.update(zip(shard.keys, row_ids, strict=True))
            return
        shards = list(self.shards.values())
        first_ids = [each.first_id for each in shards]
        for key, row_id in zip(shard.keys, row_ids, strict=True):
            current_id = self.row_ids.setdefault(key, row_id)
            other = shards[bisect.bisect(first_ids, current_id) - 1]
            if shard.name < other.name:
                self.row_ids[key] = row_id
                other.shadowed = True
            elif other is not shard:
                shard.shadowed = True

    def _remove_shards(self, names: Iterable[str]) -> None:
        """Remove shards and their keys from the index."""
        removed = [self.shards[name] for name in names if name in self.shards]
        for shard in removed:
            for row_id, key in enumerate(shard.keys, shard.first_id):
                if self.row_ids.get(key) == row_id:
                    del self.row_ids[key]
            # Last: after a KeyboardInterrupt each row id must still have a shard.
            del self.shards[shard.name]
        if not self.shards:
            self._cache.clear()
        if removed:  # other shards may have some of the keys
            for shard in self.shards.values():
                if shard.shadowed:
                    self._add_keys(shard)

    def _reject(self, name: str, error: Exception) -> None:
        """Remove a shard that cannot be read; rename it if it is damaged."""
        with self._lock:
            self._remove_shards([name])
            if isinstance(error, OSError) and error.errno in _DELETED_ERRNOS:
                self._fingerprint = None  # list again: another file may have the rows
                return
            self.rejected.add(name)
        file = self.folder / name
        problem, action = "cannot be read", "left in place"
        if isinstance(error, ValueError):
            problem = "is damaged"
            with contextlib.suppress(OSError):  # the directory may be read-only
                file.rename(file.with_suffix(".corrupt"))
                action = "renamed to .corrupt"
        warnings.warn(
            f"The file {str(file)!r} of a feature store {problem}: {error}. It was "
            f"{action}, and its rows will be computed again.",
            UserWarning,
            stacklevel=2,
        )

    def _verify(
        self, shard: Shard, indices: NDArray[np.intp], rows: NDArray[Any]
    ) -> None:
        """Raise ValueError if some rows of a shard are damaged."""
        keys = [shard.keys[index] for index in indices.tolist()]
        expected = shard.checksums[indices].tolist()
        if self._checksums(keys, rows) != expected:
            raise ValueError("the checksum of a row does not match")
        if not np.isfinite(rows).all():
            raise ValueError("it contains NaN or infinity")

    def _checksums(self, keys: Sequence[bytes], rows: NDArray[Any]) -> list[int]:
        """Return the CRC32 of each row, which depends on namespace and key as well."""
        crc32, seed = zlib.crc32, self._checksum_seed
        return [
            crc32(row, crc32(key, seed)) for key, row in zip(keys, rows, strict=True)
        ]
