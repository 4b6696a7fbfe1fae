"""In-memory cache of rows that were read from a store and verified.

Rows are identified by row ids. A row id denotes one row of one file for the lifetime of
the process: when the file is merged, replaced, damaged or evicted, its ids are never
looked up again. Cached rows therefore stay valid whatever happens on disk.
"""

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**28  # of cached rows in a process, over all stores
# Larger rows, such as activations, are not cached: reading them again costs little
# compared with using them, and they would soon evict each other.
_MAX_ROW_BYTES = 2**16

_lock = threading.Lock()  # held by writers; readers need no lock


class RowCache:
    """Cache of the rows of one namespace.

    Rows are stored in one contiguous buffer, so that many are gathered in one call.
    Threads may look up rows while another thread adds some: the slot of a row is
    published after the row is copied and never changes, and the buffer is replaced
    together with all of its slots.
    """

    def __init__(self) -> None:
        # The buffer of rows, and the slot in it of each row id.
        self._contents: tuple[NDArray[Any], dict[int | None, int]] = np.empty(0), {}
        with _lock:
            _caches.add(self)

    def __len__(self) -> int:
        """Return the number of cached rows."""
        return len(self._contents[1])

    def lookup(
        self, row_ids: Iterable[int | None], n: int
    ) -> tuple[NDArray[np.intp], NDArray[Any]]:
        """Return the slots of n rows, -1 for those not cached, and the buffer."""
        buffer, slots = self._contents
        found = map(slots.get, row_ids, itertools.repeat(-1))
        return np.fromiter(found, np.intp, n), buffer

    def add(
        self, row_ids: Sequence[int], rows: NDArray[Any], n_namespace_rows: int
    ) -> None:
        """Cache verified rows, unless they are too large.

        Parameters
        ----------
        row_ids : sequence of int
            Ids of the rows.
        rows : ndarray of shape (len(row_ids), ...)
            Rows, at least one.
        n_namespace_rows : int
            Number of rows of the namespace, from which the capacity is derived.
        """
        if rows.nbytes > MAX_BYTES or rows[0].nbytes > _MAX_ROW_BYTES:
            return
        with _lock:
            if sum(cache.nbytes for cache in _caches) + rows.nbytes > MAX_BYTES:
                for cache in _caches:
                    cache.clear()
            buffer, slots = self._contents
            if not slots.keys().isdisjoint(row_ids):
                return  # added by another thread in the meantime
            begin, end = len(slots), len(slots) + len(rows)
            fits = buffer.shape[1:] == rows.shape[1:] and buffer.dtype == rows.dtype
            if end > len(buffer) or not fits:
                # Capacity for a growing namespace, and for rows that are merged and
                # read again; np.empty uses no memory for slots that stay unused.
                capacity = min(2 * n_namespace_rows, MAX_BYTES // rows[0].nbytes)
                begin, end = 0, len(rows)
                buffer = np.empty((max(capacity, end), *rows.shape[1:]), rows.dtype)
                slots = {}
            buffer[begin:end] = rows
            slots.update(zip(row_ids, range(begin, end), strict=True))
            self._contents = buffer, slots

    def clear(self) -> None:
        """Evict all rows; concurrent readers keep the buffer they looked up."""
        self._contents = np.empty(0), {}

    @property
    def nbytes(self) -> int:
        """Size of the cached rows in bytes."""
        buffer, slots = self._contents
        return len(slots) * buffer[:1].nbytes


_caches: weakref.WeakSet[RowCache] = weakref.WeakSet()
