"""An index returns the right rows while shards are written, merged and damaged."""

import errno
import hashlib
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from store_rows import KEYS, SPACE, check_rows, find_shards, make_rows

from sktl import FeatureStore
from sktl._store import feature_store, shard_index
from sktl._store import shard as shard_module
from sktl._store.shard import list_shards, read_rows
from sktl._store.shard_index import ShardIndex
from sktl._utils.files import write_atomically


def test_merging_bounds_files_and_bytes_written(tmp_path, monkeypatch):
    written = []

    def record_write(file, content):
        written.append(len(content))
        write_atomically(file, content)

    monkeypatch.setattr(shard_index, "write_atomically", record_write)
    store = FeatureStore(tmp_path)
    for key in KEYS:
        store.put(SPACE, [key], make_rows([key], 1000))
    n_rewrites = np.log2(len(KEYS))  # each at least doubles the size of a shard
    assert len(find_shards(tmp_path)) <= n_rewrites
    assert sum(written) <= n_rewrites * store.info()["bytes"]
    np.testing.assert_array_equal(store.get(SPACE, KEYS)[1], make_rows(KEYS, 1000))
    assert store.verify() == {"rows": len(KEYS), "corrupt": 0}


def test_merging_keeps_the_row_read_before(tmp_path):
    store = FeatureStore(tmp_path)
    index = store._index(SPACE)
    store.put(SPACE, KEYS[:1], make_rows(KEYS[:1]))
    for i in range(1, shard_index.MIN_SHARDS_TO_MERGE):  # as if written at once
        rows = make_rows([KEYS[0], KEYS[i]])
        rows[0] += 0.5
        index.write([KEYS[0], KEYS[i]], rows, time.time_ns())
    index.merge(2**20)
    assert len(find_shards(tmp_path)) == 1
    check_rows(store, KEYS[: shard_index.MIN_SHARDS_TO_MERGE])


def test_merging_fills_shards_up_to_the_limit(tmp_path):
    store = FeatureStore(tmp_path, max_bytes=8 * 40_000)
    for key in KEYS:
        store.put(SPACE, [key], make_rows([key], 1000))
    sizes = [shard.stat().st_size for shard in find_shards(tmp_path)]
    assert max(sizes) <= 40_000
    assert len(sizes) <= 40 * 4100 / 20_000 + shard_index.MIN_SHARDS_TO_MERGE
    np.testing.assert_array_equal(store.get(SPACE, KEYS)[1], make_rows(KEYS, 1000))


def test_row_of_the_oldest_shard_is_read(tmp_path):
    store = FeatureStore(tmp_path)
    index = store._index(SPACE)
    folder = index.folder
    folder.mkdir(parents=True)
    for time_ns in (3, 1, 2):
        keys = KEYS[time_ns:5]
        index.write(keys, make_rows(keys) + time_ns, time_ns)
    for remaining in ({1, 2, 3}, {2, 3}, {3}):
        _, rows = store.get(SPACE, KEYS[3:5])
        np.testing.assert_array_equal(rows, make_rows(KEYS[3:5]) + min(remaining))
        positions, _ = store.get(SPACE, KEYS)
        assert positions.tolist() == list(range(min(remaining), 5))
        find_shards(tmp_path)[0].unlink()
    assert store.get(SPACE, KEYS)[1] is None


def rewrite(shard, **changed):
    save_file({**load_file(shard), **changed}, shard)


def write_nan_with_valid_checksum(shard):
    index = shard_index.ShardIndex(shard.parent)
    rows = load_file(shard)["rows"].copy()
    rows[5, 1] = np.nan
    sums = np.array(index._checksums(KEYS, rows), np.uint32)
    rewrite(shard, rows=rows, checksums=sums)


def flip_bit(shard):
    content = bytearray(shard.read_bytes())
    content[content.index(make_rows(KEYS).tobytes()) + 20] ^= 4
    shard.write_bytes(content)


class Attack:
    def __reduce__(self):  # noqa: D105
        return os.mkdir, ("executed",)


DAMAGE = {
    "zero bytes": lambda shard: shard.write_bytes(b""),
    "truncated": lambda shard: shard.write_bytes(shard.read_bytes()[:-40]),
    "truncated header": lambda shard: shard.write_bytes(shard.read_bytes()[:50]),
    "random": lambda shard: shard.write_bytes(np.random.default_rng(0).bytes(900)),
    "deeply nested": lambda shard: shard.write_bytes(
        (90_000).to_bytes(8, "little") + b"[" * 90_000
    ),
    "flipped bit": flip_bit,
    "wrong shape": lambda shard: rewrite(shard, rows=make_rows(KEYS, 2)),
    "wrong dtype": lambda shard: rewrite(shard, rows=make_rows(KEYS).astype("i4")),
    "wrong keys": lambda shard: rewrite(shard, keys=np.zeros((40, 16), np.uint8)),
    "NaN": write_nan_with_valid_checksum,
    "pickle": lambda shard: shard.write_bytes(pickle.dumps(Attack())),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "new"])
def test_damaged_rows_are_never_returned(tmp_path, monkeypatch, damage, indexed):
    monkeypatch.chdir(tmp_path)
    store = FeatureStore(tmp_path / "store")
    store.put(SPACE, KEYS, make_rows(KEYS))
    (shard,) = find_shards(tmp_path)
    DAMAGE[damage](shard)
    if not indexed:
        feature_store._indexes.clear()
    with pytest.warns(UserWarning, match="is damaged") as warned:
        positions, rows = store.get(SPACE, KEYS)
    assert len(warned) == 1
    assert len(positions) == 0
    assert rows is None
    assert not find_shards(tmp_path)
    assert list(tmp_path.rglob("*.corrupt"))
    assert not (tmp_path / "executed").exists()
    store.put(SPACE, KEYS, make_rows(KEYS))
    check_rows(store)


def test_shard_of_another_namespace_is_rejected(filled_store):
    other = {**SPACE, "weights": "cd" * 32}
    filled_store.put(other, [b"z" * 32], make_rows([b"z" * 32]))
    folder = filled_store._index(SPACE).folder
    other_folder = filled_store._index(other).folder
    (shard,) = find_shards(folder)
    (other_folder / shard.name).write_bytes(shard.read_bytes())
    with pytest.warns(UserWarning, match="checksum"):
        positions, _ = filled_store.get(other, [*KEYS, b"z" * 32])
    assert positions.tolist() == [len(KEYS)]


def test_stray_shard_of_another_shape_is_rejected(filled_store):
    # As the first shard that is read, it would determine the shape of the rows.
    index = filled_store._index({**SPACE, "layer": "wider"})
    filled_store.put({**SPACE, "layer": "wider"}, KEYS[:3], make_rows(KEYS[:3], 9))
    (stray,) = find_shards(index.folder)
    stray.rename(filled_store._index(SPACE).folder / shard_module.new_shard_name(0))
    feature_store._indexes.clear()
    with pytest.warns(UserWarning, match="checksum"):
        check_rows(filled_store)


def test_other_files_are_ignored(filled_store):
    folder = filled_store._index(SPACE).folder
    others = [folder / "copy.safetensors", folder / "mine.json", folder / "x.tmp"]
    for file in others:
        file.write_bytes(find_shards(filled_store.directory)[0].read_bytes())
    (folder.parent / "notes").mkdir()
    feature_store._indexes.clear()
    for key in range(100, 120):  # which triggers merging
        filled_store.put(SPACE, [bytes([key]) * 32], make_rows([bytes([key])]))
    check_rows(filled_store)
    assert len(filled_store.info()["spaces"]) == 1
    filled_store.clear()
    assert all(file.exists() for file in others)
    assert filled_store.info() == {"rows": 0, "bytes": 0, "spaces": {}}


def test_unreadable_shard_is_left_in_place(filled_store, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "read_rows", refused)
        with pytest.warns(UserWarning, match=r"cannot be read.*left in place"):
            positions, _ = filled_store.get(SPACE, KEYS)
    assert len(positions) == 0
    assert len(find_shards(filled_store.directory)) == 1


def test_undeletable_shards_are_merged_once(tmp_path, monkeypatch):
    def refused(file, missing_ok=False):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(file))

    monkeypatch.setattr(Path, "unlink", refused)
    store = FeatureStore(tmp_path)
    for key in KEYS:
        store.put(SPACE, [key], make_rows([key]))
    check_rows(store)
    assert len(find_shards(tmp_path)) == len(KEYS) + 1


def test_concurrent_merges(tmp_path):
    store = FeatureStore(tmp_path)

    def put(key):
        store.put(SPACE, [key], make_rows([key]))
        check_rows(store, [key])

    keys = [bytes([i]) * 32 for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, keys))
    check_rows(store, keys)
    assert store.verify() == {"rows": 200, "corrupt": 0}


def test_stale_file_handle_is_a_miss(filled_store, monkeypatch):
    def stale(*arguments):  # as raised by network file systems
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shard_index, "read_rows", stale)
    positions, _ = filled_store.get(SPACE, KEYS)
    assert len(positions) == 0


def test_links_and_pipes_are_not_opened(filled_store):
    folder = filled_store._index(SPACE).folder
    os.mkfifo(folder / shard_module.new_shard_name(1))
    (folder / shard_module.new_shard_name(2)).symlink_to("/dev/zero")
    feature_store._indexes.clear()
    check_rows(filled_store)


def test_shard_deleted_while_reading_is_a_miss(filled_store, monkeypatch):
    index = filled_store._index(SPACE)
    locate = index._locate

    def locate_and_delete(keys, positions):
        found = locate(keys, positions)
        for shard in find_shards(filled_store.directory):
            shard.unlink()
        return found

    monkeypatch.setattr(index, "_locate", locate_and_delete)
    positions, rows = filled_store.get(SPACE, KEYS)
    assert len(positions) == 0
    assert rows is None


def test_a_row_is_read_from_disk_once(filled_store, monkeypatch):
    check_rows(filled_store, KEYS[:30])
    read = []

    def record_read(file, shard, indices):
        read.extend(indices.tolist())
        return read_rows(file, shard, indices)

    monkeypatch.setattr(shard_index, "read_rows", record_read)
    check_rows(filled_store, KEYS[:30][::-1])
    assert read == []
    check_rows(filled_store, KEYS * 2)
    assert read == list(range(30, 40))


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_threads_read_while_a_file_is_damaged(filled_store):
    (shard,) = find_shards(filled_store.directory)
    good = shard.read_bytes()
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            shard.write_bytes(good[:-30] + bytes(30))
            shard.write_bytes(good)

    wrong = []

    def read():
        for _ in range(200):
            positions, rows = filled_store.get(SPACE, KEYS)
            expected = make_rows([KEYS[i] for i in positions])
            if rows is not None and not np.array_equal(rows, expected):
                wrong.append(rows)

    readers = [threading.Thread(target=read) for _ in range(4)]
    damager = threading.Thread(target=flip)
    for thread in (*readers, damager):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    damager.join()
    assert not wrong


def test_unchanged_folder_is_listed_once(tmp_path):
    FeatureStore(tmp_path).put(SPACE, KEYS[:3], make_rows(KEYS[:3]))
    folder = find_shards(tmp_path)[0].parent
    index, other = ShardIndex(folder), ShardIndex(folder)
    with patch.object(shard_index, "list_shards", wraps=list_shards) as listed:
        index.refresh()
        index.refresh()
        assert listed.call_count == 2  # changed too recently
        os.utime(folder, (1e9, 1e9))
        index.refresh()
        index.refresh()
        assert listed.call_count == 3
    other.write(KEYS[3:5], make_rows(KEYS[3:5]), time.time_ns())
    assert index.get(KEYS[:5])[0].tolist() == [0, 1, 2, 3, 4]
    shutil.rmtree(folder)
    assert index.get(KEYS[:5])[1] is None


def test_damage_in_unchanged_folder_is_detected(tmp_path):
    FeatureStore(tmp_path).put(SPACE, KEYS[:3], make_rows(KEYS[:3]))
    (shard,) = find_shards(tmp_path)
    os.utime(shard.parent, (1e9, 1e9))
    index = ShardIndex(shard.parent)
    index.get(KEYS[:1])
    content = shard.read_bytes()
    shard.write_bytes(content.replace(make_rows(KEYS[2:3]).tobytes(), b"\1" * 12))
    np.testing.assert_array_equal(index.get(KEYS[:1])[1], make_rows(KEYS[:1]))
    with pytest.warns(UserWarning, match="checksum of a row does not match"):
        positions, rows = index.get(KEYS[:3])
    assert positions.tolist() == [0]  # read and checked before the damage
    np.testing.assert_array_equal(rows, make_rows(KEYS[:1]))


@pytest.mark.slow
def test_large_namespace_has_larger_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "_MANY_SHARDS", 8)
    index = ShardIndex(tmp_path)
    keys = [hashlib.sha256(i.to_bytes(2, "big")).digest() for i in range(1200)]
    merged = 3000  # bytes, of about 40 rows
    n_files = []
    for start in range(0, len(keys), 4):
        some = keys[start : start + 4]
        index.write(some, make_rows(some, 10), time.time_ns())
        index.merge(merged)
        n_files.append(len(find_shards(tmp_path)))
    # 1200 rows of 76 bytes would fill 30 shards of that size, and be in 60.
    assert max(n_files) < 4 * 8
    sizes = [shard.stat().st_size for shard in find_shards(tmp_path)]
    assert merged < max(sizes) <= 16 * merged
    np.testing.assert_array_equal(index.get(keys)[1], make_rows(keys, 10))
    monkeypatch.setattr(shard_index, "_MAX_SHARD_BYTES", 4 * merged)
    assert index._merge_limit(merged) == merged
    assert index._merge_limit(0) == 0  # of a store with a tiny max_bytes


def test_temporarily_missing_shard_is_read_again(tmp_path, monkeypatch):
    FeatureStore(tmp_path).put(SPACE, KEYS[:3], make_rows(KEYS[:3]))
    (shard,) = find_shards(tmp_path)
    os.utime(shard.parent, (1e9, 1e9))
    index = ShardIndex(shard.parent)
    index.refresh()
    with patch.object(shard_index, "read_rows", side_effect=OSError(errno.ESTALE, "")):
        assert index.get(KEYS[:3])[1] is None
    np.testing.assert_array_equal(index.get(KEYS[:3])[1], make_rows(KEYS[:3]))


def test_own_rows_are_found_without_modification_times(tmp_path):
    with patch.object(shard_index, "folder_fingerprint", return_value=(1, 2, 3)):
        store = FeatureStore(tmp_path)
        for start in range(0, 40, 4):
            store.put(
                SPACE, KEYS[start : start + 4], make_rows(KEYS[start : start + 4])
            )
            store.put(SPACE, KEYS[: start + 4], make_rows(KEYS[: start + 4]))
        check_rows(store)
        assert store.info()["rows"] == 40
        store.clear()
        assert store.get(SPACE, KEYS)[1] is None
