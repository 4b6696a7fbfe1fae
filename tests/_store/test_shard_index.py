"""Shards come and go, are merged and damaged: what is read stays right."""

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
from store_rows import KEYS, SPACE, check, rows_of, shards

from sktl import FeatureStore
from sktl._store import feature_store, shard_index
from sktl._store import shard as shard_module
from sktl._store.shard import read_rows, shards_in
from sktl._store.shard_index import ShardIndex
from sktl._utils.files import write_atomically


def test_small_shards_are_merged_and_rows_seldom_written_again(tmp_path, monkeypatch):
    written = []

    def noted(file, content):
        written.append(len(content))
        write_atomically(file, content)

    monkeypatch.setattr(shard_index, "write_atomically", noted)
    mine = FeatureStore(tmp_path)
    for key in KEYS:
        mine.put(SPACE, [key], rows_of([key], 1000))
    twofold = np.log2(len(KEYS))  # so often
    assert len(shards(tmp_path)) <= twofold
    assert sum(written) <= twofold * mine.info()["bytes"]
    np.testing.assert_array_equal(mine.get(SPACE, KEYS)[1], rows_of(KEYS, 1000))
    assert mine.verify() == {"rows": len(KEYS), "corrupt": 0}


def test_merging_keeps_the_row_that_won(tmp_path):
    mine = FeatureStore(tmp_path)
    index = mine._index(SPACE)
    mine.put(SPACE, KEYS[:1], rows_of(KEYS[:1]))
    for i in range(1, shard_index.MERGE_FROM):  # as if each knew of no other
        rows = rows_of([KEYS[0], KEYS[i]])
        rows[0] += 0.5
        index.write([KEYS[0], KEYS[i]], rows, time.time_ns())
    index.merge(2**20)
    assert len(shards(tmp_path)) == 1
    check(mine, KEYS[: shard_index.MERGE_FROM])


def test_merging_fills_shards_up_to_the_limit(tmp_path):
    mine = FeatureStore(tmp_path, max_bytes=8 * 40_000)
    for key in KEYS:
        mine.put(SPACE, [key], rows_of([key], 1000))
    sizes = [shard.stat().st_size for shard in shards(tmp_path)]
    assert max(sizes) <= 40_000
    assert len(sizes) <= 40 * 4100 / 20_000 + shard_index.MERGE_FROM
    np.testing.assert_array_equal(mine.get(SPACE, KEYS)[1], rows_of(KEYS, 1000))


def test_the_row_of_the_oldest_shard_counts(tmp_path):
    mine = FeatureStore(tmp_path)
    index = mine._index(SPACE)
    folder = index.folder
    folder.mkdir(parents=True)
    for moment in (3, 1, 2):
        index.write(KEYS[moment:5], rows_of(KEYS[moment:5]) + moment, moment)
    for moments in ({1, 2, 3}, {2, 3}, {3}):
        _, rows = mine.get(SPACE, KEYS[3:5])
        np.testing.assert_array_equal(rows, rows_of(KEYS[3:5]) + min(moments))
        positions, _ = mine.get(SPACE, KEYS)
        assert positions.tolist() == list(range(min(moments), 5))
        shards(tmp_path)[0].unlink()
    assert mine.get(SPACE, KEYS)[1] is None


def rewritten(shard, **changed):
    save_file({**load_file(shard), **changed}, shard)


def nan_with_its_checksum(shard):
    index = shard_index.ShardIndex(shard.parent)
    rows = load_file(shard)["rows"].copy()
    rows[5, 1] = np.nan
    sums = np.array(index._checksums(KEYS, rows), np.uint32)
    rewritten(shard, rows=rows, checksums=sums)


def one_bit(shard):
    content = bytearray(shard.read_bytes())
    content[content.index(rows_of(KEYS).tobytes()) + 20] ^= 4
    shard.write_bytes(content)


class Evil:
    def __reduce__(self):  # noqa: D105
        return os.mkdir, ("executed",)


DAMAGES = {
    "zero bytes": lambda shard: shard.write_bytes(b""),
    "truncated": lambda shard: shard.write_bytes(shard.read_bytes()[:-40]),
    "header cut": lambda shard: shard.write_bytes(shard.read_bytes()[:50]),
    "random": lambda shard: shard.write_bytes(np.random.default_rng(0).bytes(900)),
    "deep": lambda shard: shard.write_bytes(
        (90_000).to_bytes(8, "little") + b"[" * 90_000
    ),
    "one bit": one_bit,
    "wrong shape": lambda shard: rewritten(shard, rows=rows_of(KEYS, 2)),
    "wrong dtype": lambda shard: rewritten(shard, rows=rows_of(KEYS).astype("i4")),
    "wrong keys": lambda shard: rewritten(shard, keys=np.zeros((40, 16), np.uint8)),
    "NaN": nan_with_its_checksum,
    "pickle": lambda shard: shard.write_bytes(pickle.dumps(Evil())),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "new"])
def test_c5_c6_damage_is_never_returned(tmp_path, monkeypatch, damage, seen):
    monkeypatch.chdir(tmp_path)
    mine = FeatureStore(tmp_path / "store")
    mine.put(SPACE, KEYS, rows_of(KEYS))
    (shard,) = shards(tmp_path)
    DAMAGES[damage](shard)
    if not seen:
        feature_store._indexes.clear()
    with pytest.warns(UserWarning, match="is damaged") as warned:
        check_nothing, rows = mine.get(SPACE, KEYS)
    assert len(warned) == 1
    assert len(check_nothing) == 0
    assert rows is None
    assert not shards(tmp_path)
    assert list(tmp_path.rglob("*.corrupt"))
    assert not (tmp_path / "executed").exists()
    mine.put(SPACE, KEYS, rows_of(KEYS))
    check(mine)


def test_c5_a_shard_of_another_space_is_not_believed(filled):
    other = {**SPACE, "weights": "cd" * 32}
    filled.put(other, [b"z" * 32], rows_of([b"z" * 32]))
    mine = filled._index(SPACE).folder
    theirs = filled._index(other).folder
    (shard,) = shards(mine)
    (theirs / shard.name).write_bytes(shard.read_bytes())
    with pytest.warns(UserWarning, match="checksum"):
        positions, _ = filled.get(other, [*KEYS, b"z" * 32])
    assert positions.tolist() == [len(KEYS)]


def test_a_stray_shard_of_another_shape_does_no_harm(filled):
    # It would be the first that is read, and so say what shape rows have.
    index = filled._index({**SPACE, "layer": "wider"})
    filled.put({**SPACE, "layer": "wider"}, KEYS[:3], rows_of(KEYS[:3], 9))
    (stray,) = shards(index.folder)
    stray.rename(filled._index(SPACE).folder / shard_module.new_name(0))
    feature_store._indexes.clear()
    with pytest.warns(UserWarning, match="checksum"):
        check(filled)


def test_files_that_are_not_the_stores_are_left_alone(filled):
    folder = filled._index(SPACE).folder
    strange = [folder / "copy.safetensors", folder / "mine.json", folder / "x.tmp"]
    for file in strange:
        file.write_bytes(shards(filled.directory)[0].read_bytes())
    (folder.parent / "notes").mkdir()
    feature_store._indexes.clear()
    for key in range(100, 120):  # merging comes by too
        filled.put(SPACE, [bytes([key]) * 32], rows_of([bytes([key])]))
    check(filled)
    assert len(filled.info()["spaces"]) == 1
    filled.clear()
    assert all(file.exists() for file in strange)
    assert filled.info() == {"rows": 0, "bytes": 0, "spaces": {}}


def test_a_shard_that_we_may_not_read_is_left_alone(filled, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "read_rows", refused)
        with pytest.warns(UserWarning, match=r"cannot be read.*left where it is"):
            positions, _ = filled.get(SPACE, KEYS)
    assert len(positions) == 0
    assert len(shards(filled.directory)) == 1


def test_shards_that_we_may_not_delete_are_merged_once(tmp_path, monkeypatch):
    def refused(file, missing_ok=False):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(file))

    monkeypatch.setattr(Path, "unlink", refused)
    mine = FeatureStore(tmp_path)
    for key in KEYS:
        mine.put(SPACE, [key], rows_of([key]))
    check(mine)
    assert len(shards(tmp_path)) == len(KEYS) + 1


def test_threads_that_merge_at_the_same_time(tmp_path):
    mine = FeatureStore(tmp_path)

    def put(key):
        mine.put(SPACE, [key], rows_of([key]))
        check(mine, [key])

    keys = [bytes([i]) * 32 for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, keys))
    check(mine, keys)
    assert mine.verify() == {"rows": 200, "corrupt": 0}


def test_a_shard_removed_by_another_machine_is_a_miss(filled, monkeypatch):
    def stale(*arguments):  # as network file systems say it
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shard_index, "read_rows", stale)
    positions, _ = filled.get(SPACE, KEYS)
    assert len(positions) == 0


def test_links_and_pipes_are_not_opened(filled):
    folder = filled._index(SPACE).folder
    os.mkfifo(folder / shard_module.new_name(1))
    (folder / shard_module.new_name(2)).symlink_to("/dev/zero")
    feature_store._indexes.clear()
    check(filled)


def test_c11_a_shard_that_goes_while_reading_is_a_miss(filled, monkeypatch):
    index = filled._index(SPACE)
    locate = index._locate

    def then_gone(keys, positions):
        found = locate(keys, positions)
        for shard in shards(filled.directory):
            shard.unlink()
        return found

    monkeypatch.setattr(index, "_locate", then_gone)
    positions, rows = filled.get(SPACE, KEYS)
    assert len(positions) == 0
    assert rows is None


def test_a_row_is_read_from_disk_once(filled, monkeypatch):
    check(filled, KEYS[:30])
    read = []

    def noted(file, shard, rows):
        read.extend(rows.tolist())
        return read_rows(file, shard, rows)

    monkeypatch.setattr(shard_index, "read_rows", noted)
    check(filled, KEYS[:30][::-1])
    assert read == []
    check(filled, KEYS * 2)
    assert read == list(range(30, 40))


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_threads_read_while_another_damages(filled):
    (shard,) = shards(filled.directory)
    good = shard.read_bytes()
    stop = threading.Event()

    def flip():
        while not stop.is_set():
            shard.write_bytes(good[:-30] + bytes(30))
            shard.write_bytes(good)

    wrong = []

    def read():
        for _ in range(200):
            positions, rows = filled.get(SPACE, KEYS)
            expected = rows_of([KEYS[i] for i in positions])
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


def test_a_folder_that_rests_is_listed_once_and_one_that_changed_again(tmp_path):
    FeatureStore(tmp_path).put(SPACE, KEYS[:3], rows_of(KEYS[:3]))
    folder = shards(tmp_path)[0].parent
    mine, other = ShardIndex(folder), ShardIndex(folder)
    with patch.object(shard_index, "shards_in", wraps=shards_in) as listed:
        mine.refresh()
        mine.refresh()
        assert listed.call_count == 2  # it changed this very moment
        os.utime(folder, (1e9, 1e9))
        mine.refresh()
        mine.refresh()
        assert listed.call_count == 3
    other.write(KEYS[3:5], rows_of(KEYS[3:5]), time.time_ns())
    assert mine.get(KEYS[:5])[0].tolist() == [0, 1, 2, 3, 4]
    shutil.rmtree(folder)
    assert mine.get(KEYS[:5])[1] is None


def test_what_is_damaged_in_a_folder_that_rests_is_not_believed(tmp_path):
    FeatureStore(tmp_path).put(SPACE, KEYS[:3], rows_of(KEYS[:3]))
    (shard,) = shards(tmp_path)
    os.utime(shard.parent, (1e9, 1e9))
    mine = ShardIndex(shard.parent)
    mine.get(KEYS[:1])
    content = shard.read_bytes()
    shard.write_bytes(content.replace(rows_of(KEYS[2:3]).tobytes(), b"\1" * 12))
    np.testing.assert_array_equal(mine.get(KEYS[:1])[1], rows_of(KEYS[:1]))
    with pytest.warns(UserWarning, match="checksum of a row is wrong"):
        positions, rows = mine.get(KEYS[:3])
    assert positions.tolist() == [0]  # read and checked before the damage
    np.testing.assert_array_equal(rows, rows_of(KEYS[:1]))


def test_a_large_space_has_larger_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "_MANY", 8)
    index = ShardIndex(tmp_path)
    keys = [hashlib.sha256(i.to_bytes(2, "big")).digest() for i in range(1200)]
    merged = 3000  # bytes, of about 40 rows
    n_files = []
    for start in range(0, len(keys), 4):
        some = keys[start : start + 4]
        index.write(some, rows_of(some, 10), time.time_ns())
        index.merge(merged)
        n_files.append(len(shards(tmp_path)))
    # 1200 rows of 76 bytes would fill 30 shards of that size, and be in 60.
    assert max(n_files) < 4 * 8
    sizes = [shard.stat().st_size for shard in shards(tmp_path)]
    assert merged < max(sizes) <= 16 * merged
    np.testing.assert_array_equal(index.get(keys)[1], rows_of(keys, 10))
    monkeypatch.setattr(shard_index, "_LARGEST", 4 * merged)
    assert index._limit(merged) == merged
    assert index._limit(0) == 0  # of a store that may have next to nothing


def test_a_shard_that_was_gone_for_a_moment_is_read_again(tmp_path, monkeypatch):
    FeatureStore(tmp_path).put(SPACE, KEYS[:3], rows_of(KEYS[:3]))
    (shard,) = shards(tmp_path)
    os.utime(shard.parent, (1e9, 1e9))
    mine = ShardIndex(shard.parent)
    mine.refresh()
    with patch.object(shard_index, "read_rows", side_effect=OSError(errno.ESTALE, "")):
        assert mine.get(KEYS[:3])[1] is None
    np.testing.assert_array_equal(mine.get(KEYS[:3])[1], rows_of(KEYS[:3]))


def test_own_rows_are_seen_where_a_folder_tells_no_time(tmp_path):
    with patch.object(shard_index, "settled_state", return_value=(1, 2, 3)):
        mine = FeatureStore(tmp_path)
        for start in range(0, 40, 4):
            mine.put(SPACE, KEYS[start : start + 4], rows_of(KEYS[start : start + 4]))
            mine.put(SPACE, KEYS[: start + 4], rows_of(KEYS[: start + 4]))
        check(mine)
        assert mine.info()["rows"] == 40
        mine.clear()
        assert mine.get(SPACE, KEYS)[1] is None
