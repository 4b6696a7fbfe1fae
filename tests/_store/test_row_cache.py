"""Rows in the memory of a process: the right ones, and not too many."""

import threading

import numpy as np
import pytest
from store_rows import KEYS, SPACE, check, rows_of

from sktl import FeatureStore
from sktl._store import row_cache, shard_index
from sktl._store.row_cache import RowCache


def n_kept():
    return sum(len(each._block[1]) for each in row_cache._all)


@pytest.fixture(autouse=True)
def nothing_kept_before():
    for each in row_cache._all:
        each.clear()


def test_rows_are_found_by_number():
    kept = RowCache()
    kept.add([7, 3], rows_of(KEYS[:2]), 4)
    before = kept.lookup([3, None, 7, 8], 4)
    kept.add([8, 1], rows_of(KEYS[2:4]), 4)
    for places, block in (before, kept.lookup([3, None, 7, 9], 4)):
        assert (places >= 0).tolist() == [True, False, True, False]
        np.testing.assert_array_equal(block[places[[0, 2]]], rows_of(KEYS[1::-1]))


def test_a_block_that_is_full_is_begun_anew():
    kept = RowCache()
    for i, key in enumerate(KEYS):  # the space seems to have one row, and room is for 2
        kept.add([i], rows_of([key]), 1)
        places, block = kept.lookup([i], 1)
        np.testing.assert_array_equal(block[places], rows_of([key]))
        assert len(block) == 2


def test_memory_has_a_limit(tmp_path, monkeypatch):
    mine = FeatureStore(tmp_path)
    spaces = [{"layer": layer} for layer in "abcde"]
    for n, space in enumerate(spaces, 1):
        mine.put(space, KEYS[:n], rows_of(KEYS[:n]))
    monkeypatch.setattr(row_cache, "MOST_KEPT", 3 * rows_of(KEYS[:1]).nbytes)
    for n, space in [*enumerate(spaces, 1)] * 2:
        np.testing.assert_array_equal(mine.get(space, KEYS[:n])[1], rows_of(KEYS[:n]))
        assert 0 < n_kept() <= 3


def test_what_is_cleared_takes_no_memory(filled):
    check(filled)
    assert n_kept() == len(KEYS)
    filled.clear()
    assert n_kept() == 0
    assert filled.get(SPACE, KEYS)[1] is None


def test_threads_read_while_blocks_are_replaced(filled, monkeypatch):
    monkeypatch.setattr(row_cache, "MOST_KEPT", 7 * rows_of(KEYS[:1]).nbytes)
    monkeypatch.setattr(shard_index, "_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    failed = []

    def read(orders):
        try:
            for order in orders:
                check(filled, [KEYS[i] for i in order])
        except BaseException as error:
            failed.append(error)

    orders = [[rng.permutation(40)[:9] for _ in range(100)] for _ in range(4)]
    threads = [threading.Thread(target=read, args=[each]) for each in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
