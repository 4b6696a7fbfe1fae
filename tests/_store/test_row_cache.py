"""The cache in memory returns the right rows, within its size limit."""

import threading

import numpy as np
import pytest
from store_rows import KEYS, SPACE, check_rows, make_rows

from sktl import FeatureStore
from sktl._store import row_cache, shard_index
from sktl._store.row_cache import RowCache


def n_cached():
    return sum(map(len, row_cache._caches))


@pytest.fixture(autouse=True)
def empty_caches():
    for cache in row_cache._caches:
        cache.clear()


def test_lookup_by_row_id():
    cache = RowCache()
    cache.add([7, 3], make_rows(KEYS[:2]), 4)
    before = cache.lookup([3, None, 7, 8], 4)
    cache.add([8, 1], make_rows(KEYS[2:4]), 4)
    for slots, buffer in (before, cache.lookup([3, None, 7, 9], 4)):
        assert (slots >= 0).tolist() == [True, False, True, False]
        np.testing.assert_array_equal(buffer[slots[[0, 2]]], make_rows(KEYS[1::-1]))


def test_full_buffer_is_replaced():
    cache = RowCache()
    for i, key in enumerate(KEYS):  # a namespace of one row has capacity 2
        cache.add([i], make_rows([key]), 1)
        slots, buffer = cache.lookup([i], 1)
        np.testing.assert_array_equal(buffer[slots], make_rows([key]))
        assert len(buffer) == 2


def test_memory_is_limited(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    namespaces = [{"layer": layer} for layer in "abcde"]
    for n, namespace in enumerate(namespaces, 1):
        store.put(namespace, KEYS[:n], make_rows(KEYS[:n]))
    monkeypatch.setattr(row_cache, "MAX_BYTES", 3 * make_rows(KEYS[:1]).nbytes)
    for n, namespace in [*enumerate(namespaces, 1)] * 2:
        np.testing.assert_array_equal(
            store.get(namespace, KEYS[:n])[1], make_rows(KEYS[:n])
        )
        assert 0 < n_cached() <= 3


def test_clear_frees_memory(filled_store):
    check_rows(filled_store)
    assert n_cached() == len(KEYS)
    filled_store.clear()
    assert n_cached() == 0
    assert filled_store.get(SPACE, KEYS)[1] is None


def test_threads_read_while_buffers_are_replaced(filled_store, monkeypatch):
    monkeypatch.setattr(row_cache, "MAX_BYTES", 7 * make_rows(KEYS[:1]).nbytes)
    monkeypatch.setattr(shard_index, "_ROWS_PER_READ", 3)
    rng = np.random.default_rng(0)
    errors = []

    def read(orders):
        try:
            for order in orders:
                check_rows(filled_store, [KEYS[i] for i in order])
        except BaseException as error:
            errors.append(error)

    orders = [[rng.permutation(40)[:9] for _ in range(100)] for _ in range(4)]
    threads = [threading.Thread(target=read, args=[each]) for each in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
