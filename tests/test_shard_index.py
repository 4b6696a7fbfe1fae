"""Shards come and go, are merged and damaged: what is read stays right."""

import os
import pickle
import threading
import time

import numpy as np
import pytest
from rows_of_a_store import KEYS, SPACE, check, rows_of, shards
from safetensors.numpy import load_file, save_file

from sktl import FeatureStore, _feature_store, _shard_index


def test_small_shards_are_merged(tmp_path):
    mine = FeatureStore(tmp_path)
    for key in KEYS:
        mine.put(SPACE, [key], rows_of([key]))
    assert len(shards(tmp_path)) < _shard_index.MERGE_FROM
    check(mine)
    assert mine.verify() == {"rows": len(KEYS), "corrupt": 0}


def test_merging_keeps_the_row_that_won(tmp_path):
    mine = FeatureStore(tmp_path)
    index = mine._index(SPACE)
    mine.put(SPACE, KEYS[:1], rows_of(KEYS[:1]))
    for i in range(1, _shard_index.MERGE_FROM):  # as if each knew of no other
        rows = rows_of([KEYS[0], KEYS[i]])
        rows[0] += 0.5
        index.write([KEYS[0], KEYS[i]], rows, time.time_ns())
    index.merge(2**20)
    assert len(shards(tmp_path)) == 1
    check(mine, KEYS[: _shard_index.MERGE_FROM])


def rewritten(shard, **changed):
    save_file({**load_file(shard), **changed}, shard)


def nan_with_its_checksum(shard):
    index = _shard_index.ShardIndex(shard.parent)
    rows = load_file(shard)["rows"].copy()
    rows[5, 1] = np.nan
    sums = [index._checksum(*pair) for pair in zip(KEYS, rows, strict=True)]
    rewritten(shard, rows=rows, checksums=np.array(sums, np.uint32))


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
        _feature_store._indexes.clear()
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
    (theirs / "0.safetensors").write_bytes(shards(mine)[0].read_bytes())
    with pytest.warns(UserWarning, match="checksum"):
        positions, _ = filled.get(other, KEYS)
    assert len(positions) == 0


def test_links_and_pipes_are_not_opened(filled):
    folder = filled._index(SPACE).folder
    os.mkfifo(folder / "1.safetensors")
    (folder / "2.safetensors").symlink_to("/dev/zero")
    _feature_store._indexes.clear()
    check(filled)


def test_c11_a_shard_that_goes_while_reading_is_a_miss(filled, monkeypatch):
    index = filled._index(SPACE)
    locate = index.locate

    def then_gone(keys, positions):
        found = locate(keys, positions)
        for shard in shards(filled.directory):
            shard.unlink()
        return found

    monkeypatch.setattr(index, "locate", then_gone)
    positions, rows = filled.get(SPACE, KEYS)
    assert len(positions) == 0
    assert rows is None


def test_a_row_is_read_from_disk_once(filled, monkeypatch):
    check(filled, KEYS[:30])
    read = []
    monkeypatch.setattr(
        _shard_index.ShardIndex, "_read_row", lambda *args: read.append(args[3])
    )
    check(filled, KEYS[:30][::-1])
    assert read == []
    filled.get(SPACE, KEYS)
    assert read == list(range(30, 40))


def test_rows_in_memory_have_a_limit(tmp_path, monkeypatch):
    mine = FeatureStore(tmp_path)
    for key in KEYS[:10]:
        mine.put(SPACE, [key], rows_of([key]))
    row = rows_of(KEYS[:1]).nbytes
    monkeypatch.setattr(_shard_index, "MOST_KEPT", 3 * row)
    check(mine, KEYS[:10])
    shards_now = mine._index(SPACE).shards.values()
    assert sum(shard.kept.rows.nbytes for shard in shards_now if shard.kept) <= 3 * row
    check(mine, KEYS[:10][::-1])


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
