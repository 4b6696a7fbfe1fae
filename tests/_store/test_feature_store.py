"""Rows on disk: what is read is what was written, whatever happens in between."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from store_rows import KEYS, SPACE, check, rows_of, shards

import sktl
from sktl import FeatureStore, store
from sktl._store.feature_store import _MOST_INDEXES, _indexes


def test_rows_come_back_in_the_order_asked_for(filled):
    check(filled, KEYS[::-1])
    check(filled, [KEYS[3], b"x" * 32, KEYS[1], KEYS[3]], expected=3)
    positions, rows = filled.get({**SPACE, "layer": "stem"}, KEYS)
    assert len(positions) == 0
    assert rows is None


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_rows_of_any_shape_and_type(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(4, 2, 3, 5)).astype(dtype)
    mine = FeatureStore(tmp_path)
    mine.put(SPACE, KEYS[:4], rows)
    _, got = mine.get(SPACE, KEYS[:4])
    assert got.dtype == rows.dtype
    np.testing.assert_array_equal(got, rows)


def test_a_known_row_keeps_its_bits(filled):
    filled.put(SPACE, KEYS[:2], rows_of(KEYS[:2]) + 1)
    check(filled)
    assert len(shards(filled.directory)) == 1


def test_of_many_stores_those_used_last_are_held(tmp_path):
    stores = [FeatureStore(tmp_path / str(i)) for i in range(_MOST_INDEXES + 2)]
    for mine in stores:
        mine.put(SPACE, KEYS[:1], rows_of(KEYS[:1]))
        check(stores[0], KEYS[:1])
    assert len(_indexes) == _MOST_INDEXES
    held = {Path(folder).parents[1] for folder in _indexes}
    assert stores[0].directory in held
    assert stores[1].directory not in held
    check(stores[1], KEYS[:1])


def test_what_another_process_wrote_is_seen(filled):
    code = f"""
import numpy as np
from sktl import FeatureStore
mine = FeatureStore({str(filled.directory)!r})
positions, rows = mine.get({SPACE!r}, [bytes([7]) * 32])
assert rows.tolist() == [[7, 7.125, 7.25]], rows
mine.put({SPACE!r}, [bytes([99]) * 32], np.array([[99, 99.125, 99.25]], np.float32))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    check(filled, [bytes([99]) * 32, KEYS[0]])


def test_the_oldest_are_evicted(tmp_path):
    mine = FeatureStore(tmp_path, max_bytes=20_000)
    keys = [bytes([i]) * 32 for i in range(30)]
    for key in keys:
        mine.put(SPACE, [key], np.full((1, 256), key[0], "f4"))
        assert mine.info()["bytes"] <= 20_000
    positions, _ = mine.get(SPACE, keys)
    assert 5 < len(positions) < 30
    assert positions[-1] == 29
    assert 0 not in positions


def test_info_names_the_space(filled):
    info = filled.info()
    assert info["rows"] == len(KEYS)
    assert info["bytes"] == shards(filled.directory)[0].stat().st_size
    ((name, space),) = info["spaces"].items()
    assert name.startswith("tiny, abababab, stage1 [")
    assert space["space"] == SPACE


def test_clear_deletes_nothing_else(filled):
    other = Path(filled.directory) / "mine.txt"
    other.write_text("not yours")
    filled.clear()
    assert filled.info()["rows"] == 0
    assert other.read_text() == "not yours"
    filled.put(SPACE, KEYS, rows_of(KEYS))
    check(filled)


def test_command_line(filled, capsys):
    directory = str(filled.directory)
    assert store.main([directory, "verify"]) == 0
    assert "40 rows intact" in capsys.readouterr().out
    (shard,) = shards(directory)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.main([directory, "verify"]) == 1
    store.main([directory, "clear"])
    assert "0 rows" in capsys.readouterr().out


WRITER = """
import os, sys
import numpy as np
from sktl import FeatureStore
mine = FeatureStore(sys.argv[1])
rng = np.random.default_rng(os.getpid())
print("ready", flush=True)
while True:
    numbers = rng.permutation(250)[:8]
    keys = [bytes([i]) * 32 for i in numbers]
    mine.put({space!r}, keys, np.stack([np.full(50, i, np.float32) for i in numbers]))
    if len(mine.known({space!r})) == 250:
        mine.clear()
"""


def test_c1_killed_writers_leave_whole_shards_only(tmp_path):
    code = WRITER.format(space=SPACE)
    delays = np.random.default_rng(0).uniform(0, 0.15, size=20)
    keys = [bytes([i]) * 32 for i in range(250)]
    for delay in delays:
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(delay)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        mine = FeatureStore(tmp_path)
        assert mine.verify()["corrupt"] == 0
        positions, rows = mine.get(SPACE, keys)
        if len(positions):
            assert (rows == positions[:, None]).all()
    for file in tmp_path.rglob("*.tmp"):
        os.utime(file, (0, 0))
    index = mine._index(SPACE)
    index._remove_stale()
    assert not list(tmp_path.rglob("*.tmp"))


def test_c2_eight_processes_on_the_same_keys(tmp_path):
    code = f"""
import sys
import numpy as np
from sktl import FeatureStore
mine = FeatureStore({str(tmp_path)!r})
for chunk in np.random.default_rng(int(sys.argv[1])).permutation(120).reshape(-1, 4):
    keys = [bytes([i]) * 32 for i in chunk]
    mine.put({SPACE!r}, keys, np.stack([np.full(5, i, np.float32) for i in chunk]))
    positions, rows = mine.get({SPACE!r}, keys)
    assert (rows[:, 0] == chunk[positions]).all() and len(positions) == 4
"""
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, str(i)])
        for i in range(8)
    ]
    assert [process.wait() for process in running] == [0] * 8
    keys = [bytes([i]) * 32 for i in range(120)]
    _, rows = FeatureStore(tmp_path).get(SPACE, keys)
    assert (rows[:, 0] == np.arange(120)).all()


def test_c3_a_full_disk_warns_once_and_leaves_nothing(filled, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    others = [bytes([i]) * 32 for i in range(100, 110)]
    with pytest.warns(UserWarning, match="No space left"):
        filled.put(SPACE, others[:1], rows_of(others[:1]))
    for key in others:  # a second warning would be an error
        filled.put(SPACE, [key], rows_of([key]))
    assert len(list(Path(filled.directory).rglob("*.tmp"))) == 0
    monkeypatch.undo()
    check(filled, KEYS + others, expected=len(KEYS))
    filled.put(SPACE, others, rows_of(others))
    check(filled, KEYS + others)


def test_c3_a_limit_on_the_size_of_files(tmp_path):
    code = f"""
import resource, signal, warnings
import numpy as np
from sktl import FeatureStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
mine = FeatureStore({str(tmp_path)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(3):
        mine.put({SPACE!r}, [bytes([i]) * 32], np.ones((1, 2000), np.float32))
assert len(caught) == 1 and "cannot be written" in str(caught[0].message), caught
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not shards(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_c4_without_permission_to_write(filled):
    # Root may write anywhere, unless it gives up that capability.
    may_not = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if may_not and not shutil.which("setpriv"):
        pytest.skip("running as root, and setpriv (util-linux) is not there")
    folders = [f for f in Path(filled.directory).rglob("*") if f.is_dir()]
    for folder in (Path(filled.directory), *folders):
        folder.chmod(0o555)
    code = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from store_rows import KEYS, SPACE, check, rows_of
from sktl import FeatureStore
mine = FeatureStore({str(filled.directory)!r})
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for key in (b"a", b"b"):
        mine.put(SPACE, [key * 32], rows_of([key]))
    mine.put({{"backbone": "other"}}, KEYS, rows_of(KEYS))
check(mine)
assert len(warned) == 1, warned
assert "Permission denied" in str(warned[0].message), warned[0]
"""
    subprocess.run([*may_not, sys.executable, "-c", code], check=True)


def test_c4_a_file_is_no_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for use in (lambda mine: mine.get(SPACE, KEYS), FeatureStore.info):
        with pytest.raises(ValueError, match=r"memory must be a directory.*is a file"):
            use(FeatureStore(file))


def test_equal_values_that_are_written_differently_are_two_spaces(tmp_path):
    mine = FeatureStore(tmp_path)
    folders = {mine._index({"layer": value}).folder for value in (1, True, 1.0, "1")}
    assert len(folders) == 4
    assert mine._index({"a": "1", "b": "2"}) is mine._index({"b": "2", "a": "1"})


@pytest.mark.parametrize("up", [0, 1, 2])
def test_c4_a_vanished_directory_is_made_again(filled, up):
    folder = filled._index(SPACE).folder
    shutil.rmtree([folder, *folder.parents][up])
    positions, _ = filled.get(SPACE, KEYS)
    assert len(positions) == 0
    assert filled.info()["rows"] == 0
    filled.put(SPACE, KEYS, rows_of(KEYS))
    check(filled)


def test_c10_it_holds_nothing_open(filled):
    copy = pickle.loads(pickle.dumps(filled))
    assert vars(copy) == {"directory": filled.directory, "max_bytes": None}
    check(copy)
    assert repr(copy) == f"FeatureStore({str(filled.directory)!r})"


@pytest.mark.parametrize(
    ("keys", "rows", "reason"),
    [
        ([b"short"], rows_of(KEYS[:1]), "32 bytes"),
        (["s" * 32], rows_of(KEYS[:1]), "32 bytes"),
        (KEYS[:1], np.ones((1, 0), "f4"), "array of floats"),
        (KEYS[:1], [[1, 2]], "array of floats"),
        (KEYS[:2], rows_of(KEYS[:1]), "a row for each of 2"),
        (KEYS[:1], np.ones((1, 3), int), "array of floats"),
        (KEYS[:1], np.full((1, 3), np.nan, "f4"), "finite"),
        ([b"n" * 32], rows_of(KEYS[:1], 9), "must be alike"),
    ],
)
def test_rows_that_are_none(filled, keys, rows, reason):
    with pytest.raises(ValueError, match=reason):
        filled.put(SPACE, keys, rows)


@pytest.mark.parametrize("directory", ["", "a\0b"])
def test_a_name_that_is_none(directory):
    with pytest.raises(ValueError, match="must be the name of a directory"):
        FeatureStore(directory)


def test_the_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    FeatureStore("~/mine").put(SPACE, KEYS, rows_of(KEYS))
    assert len(shards(tmp_path / "mine")) == 1


def test_a_name_too_long_warns(tmp_path):
    mine = FeatureStore(tmp_path / ("x" * 300))
    with pytest.warns(UserWarning, match="cannot be written"):
        mine.put(SPACE, KEYS, rows_of(KEYS))


@pytest.mark.parametrize("name", ["absent", "file"])
def test_command_line_needs_a_directory(tmp_path, capsys, name):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        store.main([str(tmp_path / name), "info"])
    assert "there is no directory" in capsys.readouterr().err


@pytest.mark.parametrize("max_bytes", [0, -1, "1GB", 1e9, float("nan"), True])
def test_max_bytes_is_a_positive_integer(max_bytes):
    with pytest.raises(ValueError, match="max_bytes must be a positive integer"):
        FeatureStore("anywhere", max_bytes=max_bytes)


@pytest.mark.parametrize("directory", [None, True, 3, b"bytes"])
def test_a_directory_is_a_name(directory):
    with pytest.raises(TypeError, match="directory must be a str or a path"):
        FeatureStore(directory)


def test_the_store_knows_no_torch():
    code = "import sys, sktl.store; sys.exit('torch' in sys.modules)"
    folder = Path(sktl.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "\0"])
def test_a_damaged_description_is_unknown(filled, text):
    next(Path(filled.directory).rglob("space.json")).write_text(text)
    assert filled.info()["rows"] == 40
    assert [each["space"] for each in filled.info()["spaces"].values()] == [
        {"unknown": "unknown"}
    ]
