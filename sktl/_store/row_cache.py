"""Rows of a store in the memory of a process: read and checked once, and not too many.

A row is known by a number, which means one row of one file for ever. When the file is
merged, replaced, damaged or evicted, its numbers are asked for no more. So what was
checked before it came here stays right, whatever happens on the disk.
"""

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_KEPT = 2**28  # bytes of rows in the memory of a process, of all its stores
# Bytes of a row; larger ones, as of activations, take no longer to be read again than
# to be computed with, and would soon push each other out.
_LARGEST_ROW = 2**16

_lock = threading.Lock()  # whoever adds holds it; whoever looks need not


class RowCache:
    """Rows of one space, side by side, so that many are taken in one go.

    Threads may look while another adds: the place of a row is told when it is there,
    never changes, and a block is replaced only together with all of its places.
    """

    def __init__(self) -> None:
        self._block: tuple[NDArray[Any], dict[int | None, int]] = np.empty(0), {}
        with _lock:
            _all.add(self)

    def lookup(
        self, numbers: Iterable[int | None], n: int
    ) -> tuple[NDArray[np.intp], NDArray[Any]]:
        """Give the places of n rows, -1 where one is not kept, and in what they are."""
        block, places = self._block
        found = map(places.get, numbers, itertools.repeat(-1))
        return np.fromiter(found, np.intp, n), block

    def add(self, numbers: Sequence[int], rows: NDArray[Any], n_space: int) -> None:
        """Keep rows that were checked, unless too many; the space has `n_space`."""
        if rows.nbytes > MOST_KEPT or rows[0].nbytes > _LARGEST_ROW:
            return
        with _lock:
            if sum(each._nbytes() for each in _all) + rows.nbytes > MOST_KEPT:
                for each in _all:
                    each.clear()
            block, places = self._block
            if not places.keys().isdisjoint(numbers):
                return  # another thread was first
            begin, end = len(places), len(places) + len(rows)
            alike = block.shape[1:] == rows.shape[1:] and block.dtype == rows.dtype
            if end > len(block) or not alike:
                # Room for a space that grows, and for what is merged and read again;
                # np.empty takes no memory for rows that are never put into it.
                room = min(2 * n_space, MOST_KEPT // rows[0].nbytes)
                begin, end = 0, len(rows)
                block = np.empty((max(room, end), *rows.shape[1:]), rows.dtype)
                places = {}
            block[begin:end] = rows
            places.update(zip(numbers, range(begin, end), strict=True))
            self._block = block, places

    def clear(self) -> None:
        """Free the memory; whoever reads from it just now may."""
        self._block = np.empty(0), {}

    def _nbytes(self) -> int:
        block, places = self._block
        return len(places) * block[:1].nbytes


_all: weakref.WeakSet[RowCache] = weakref.WeakSet()
