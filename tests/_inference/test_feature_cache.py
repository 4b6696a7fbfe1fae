"""One namespace of a feature store."""

import joblib
import numpy as np
import pytest

from sktl import FeatureStore
from sktl._inference.feature_cache import FeatureCache, open_cache, open_store

HASHES = [bytes([i]) * 32 for i in range(3)]
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_memory_may_be_anything_with_a_directory(tmp_path):
    store = FeatureStore(tmp_path)
    assert open_store(store) is store
    for memory in (tmp_path, str(tmp_path), joblib.Memory(tmp_path, verbose=0)):
        opened = open_store(memory)
        assert isinstance(opened, FeatureStore)
        assert opened.directory in (tmp_path, str(tmp_path))
    assert open_store(None) is None
    assert open_store(joblib.Memory(None)) is None


def test_rows_of_namespaces_are_kept_apart(tmp_path):
    store = FeatureStore(tmp_path)
    one, other = FeatureCache(store, {"a": "1"}), FeatureCache(store, {"a": "2"})
    one.put(HASHES[:2], ROWS[:2])
    other.put(HASHES[2:], ROWS[2:])
    positions, rows = one.get(HASHES)
    np.testing.assert_array_equal(positions, [0, 1])
    np.testing.assert_array_equal(rows, ROWS[:2])
    assert set(one.refresh()) == set(HASHES[:2])


def test_the_namespace_has_the_settings_of_model_and_images(tmp_path):
    cache = open_cache(tmp_path, {"a": "1"}, {"b": "2"})
    cache.put(HASHES, ROWS)
    assert cache.namespace == {"a": "1", "b": "2"}
    for model, images in ({"a": "2"}, {"b": "2"}), ({"a": "1"}, {"b": "3"}):
        assert open_cache(tmp_path, model, images).get(HASHES)[1] is None
    assert open_cache(None, {"a": "1"}, {"b": "2"}) is None


def test_refresh_finds_rows_of_another_process(tmp_path):
    cache = FeatureCache(FeatureStore(tmp_path), {"a": "1"})
    assert not cache.refresh()
    FeatureStore(tmp_path).put({"a": "1"}, HASHES, ROWS)
    assert set(cache.refresh()) == set(HASHES)


def test_other_settings(tmp_path):
    cache = open_cache(tmp_path, {"a": "1", "b": "2"}, {}, read_only=True)
    other = cache.with_settings({"b": "3"})
    assert (other.namespace, other.read_only) == ({"a": "1", "b": "3"}, True)
    assert cache.namespace == {"a": "1", "b": "2"}


def test_a_read_only_cache(tmp_path):
    cache = open_cache(tmp_path / "store", {"a": "1"}, {}, read_only=True)
    for read_only in (cache, cache.portable()):
        read_only.put(HASHES, ROWS)
        assert read_only.get(HASHES)[1] is None
    assert not (tmp_path / "store").exists()
    open_cache(tmp_path / "store", {"a": "1"}, {}).put(HASHES, ROWS)
    np.testing.assert_array_equal(cache.get(HASHES)[1], ROWS)


@pytest.mark.parametrize("max_bytes", [None, 10**6])
def test_a_portable_cache_is_the_same_in_another_directory(
    tmp_path, monkeypatch, max_bytes
):
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache(FeatureStore("here", max_bytes), {"a": "1"})
    portable = cache.portable()
    assert portable.store.max_bytes == max_bytes
    cache.put(HASHES, ROWS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(portable.get(HASHES)[1], ROWS)
