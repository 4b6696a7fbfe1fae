"""A feature store returns the rows that were written, or none."""

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
from store_rows import KEYS, SPACE, check_rows, find_shards, make_rows

import sktl
from sktl import FeatureStore
from sktl._store.feature_store import _MAX_INDEXES, _indexes
from sktl.store import main


def test_get_returns_rows_in_order_of_keys(filled_store):
    check_rows(filled_store, KEYS[::-1])
    check_rows(filled_store, [KEYS[3], b"x" * 32, KEYS[1], KEYS[3]], n_expected=3)
    positions, rows = filled_store.get({**SPACE, "layer": "stem"}, KEYS)
    assert len(positions) == 0
    assert rows is None


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_rows_of_any_shape_and_dtype(tmp_path, dtype):
    rows = np.random.default_rng(0).normal(size=(4, 2, 3, 5)).astype(dtype)
    store = FeatureStore(tmp_path)
    store.put(SPACE, KEYS[:4], rows)
    _, got = store.get(SPACE, KEYS[:4])
    assert got.dtype == rows.dtype
    np.testing.assert_array_equal(got, rows)


def test_put_does_not_change_existing_rows(filled_store):
    filled_store.put(SPACE, KEYS[:2], make_rows(KEYS[:2]) + 1)
    check_rows(filled_store)
    assert len(find_shards(filled_store.directory)) == 1


def test_least_recently_used_index_is_evicted(tmp_path):
    stores = [FeatureStore(tmp_path / str(i)) for i in range(_MAX_INDEXES + 2)]
    for each in stores:
        each.put(SPACE, KEYS[:1], make_rows(KEYS[:1]))
        check_rows(stores[0], KEYS[:1])
    assert len(_indexes) == _MAX_INDEXES
    cached = {Path(folder).parents[1] for folder in _indexes}
    assert stores[0].directory in cached
    assert stores[1].directory not in cached
    check_rows(stores[1], KEYS[:1])


def test_rows_of_another_process_are_found(filled_store):
    code = f"""
import numpy as np
from sktl import FeatureStore
store = FeatureStore({str(filled_store.directory)!r})
positions, rows = store.get({SPACE!r}, [bytes([7]) * 32])
assert rows.tolist() == [[7, 7.125, 7.25]], rows
store.put({SPACE!r}, [bytes([99]) * 32], np.array([[99, 99.125, 99.25]], np.float32))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    check_rows(filled_store, [bytes([99]) * 32, KEYS[0]])


def test_oldest_rows_are_evicted(tmp_path):
    store = FeatureStore(tmp_path, max_bytes=20_000)
    keys = [bytes([i]) * 32 for i in range(30)]
    for key in keys:
        store.put(SPACE, [key], np.full((1, 256), key[0], "f4"))
        assert store.info()["bytes"] <= 20_000
    positions, _ = store.get(SPACE, keys)
    assert 5 < len(positions) < 30
    assert positions[-1] == 29
    assert 0 not in positions


def test_info_describes_the_namespace(filled_store):
    info = filled_store.info()
    assert info["rows"] == len(KEYS)
    assert info["bytes"] == find_shards(filled_store.directory)[0].stat().st_size
    ((name, namespace),) = info["spaces"].items()
    assert name.startswith("tiny, abababab, stage1 [")
    assert namespace["space"] == SPACE


def test_clear_deletes_no_other_files(filled_store):
    other = Path(filled_store.directory) / "mine.txt"
    other.write_text("not yours")
    filled_store.clear()
    assert filled_store.info()["rows"] == 0
    assert other.read_text() == "not yours"
    filled_store.put(SPACE, KEYS, make_rows(KEYS))
    check_rows(filled_store)


def test_command_line(filled_store, capsys):
    directory = str(filled_store.directory)
    assert main([directory, "info"]) == 0
    assert "  40 rows, 0.0 MiB: backbone=tiny, " in capsys.readouterr().out
    assert main([directory, "verify"]) == 0
    assert "40 rows intact" in capsys.readouterr().out
    (shard,) = find_shards(directory)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert main([directory, "verify"]) == 1
    main([directory, "clear"])
    assert "0 rows" in capsys.readouterr().out


WRITER = """
import os, sys
import numpy as np
from sktl import FeatureStore
store = FeatureStore(sys.argv[1])
rng = np.random.default_rng(os.getpid())
print("ready", flush=True)
while True:
    indices = rng.permutation(250)[:8]
    keys = [bytes([i]) * 32 for i in indices]
    store.put({space!r}, keys, np.stack([np.full(50, i, np.float32) for i in indices]))
    if len(store.known({space!r})) == 250:
        store.clear()
"""


@pytest.mark.slow
def test_killed_writers_leave_no_partial_shards(tmp_path):
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
        store = FeatureStore(tmp_path)
        assert store.verify()["corrupt"] == 0
        positions, rows = store.get(SPACE, keys)
        if len(positions):
            assert (rows == positions[:, None]).all()
    for file in tmp_path.rglob("*.tmp"):
        os.utime(file, (0, 0))
    index = store._index(SPACE)
    index._remove_stale_files()
    assert not list(tmp_path.rglob("*.tmp"))


def test_concurrent_writers_of_the_same_keys(tmp_path):
    code = f"""
import sys
import numpy as np
from sktl import FeatureStore
store = FeatureStore({str(tmp_path)!r})
for chunk in np.random.default_rng(int(sys.argv[1])).permutation(120).reshape(-1, 4):
    keys = [bytes([i]) * 32 for i in chunk]
    store.put({SPACE!r}, keys, np.stack([np.full(5, i, np.float32) for i in chunk]))
    positions, rows = store.get({SPACE!r}, keys)
    assert (rows[:, 0] == chunk[positions]).all() and len(positions) == 4
"""
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, str(i)])
        for i in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    keys = [bytes([i]) * 32 for i in range(120)]
    _, rows = FeatureStore(tmp_path).get(SPACE, keys)
    assert (rows[:, 0] == np.arange(120)).all()


def test_full_disk_warns_once(filled_store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    others = [bytes([i]) * 32 for i in range(100, 110)]
    with pytest.warns(UserWarning, match="No space left"):
        filled_store.put(SPACE, others[:1], make_rows(others[:1]))
    for key in others:  # a second warning would be an error
        filled_store.put(SPACE, [key], make_rows([key]))
    assert len(list(Path(filled_store.directory).rglob("*.tmp"))) == 0
    monkeypatch.undo()
    check_rows(filled_store, KEYS + others, n_expected=len(KEYS))
    filled_store.put(SPACE, others, make_rows(others))
    check_rows(filled_store, KEYS + others)


def test_file_size_limit_warns_once(tmp_path):
    code = f"""
import resource, signal, warnings
import numpy as np
from sktl import FeatureStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
store = FeatureStore({str(tmp_path)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(3):
        store.put({SPACE!r}, [bytes([i]) * 32], np.ones((1, 2000), np.float32))
assert len(caught) == 1 and "cannot be written" in str(caught[0].message), caught
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not find_shards(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_read_only_directory_warns_once(filled_store):
    # Root may write anywhere, unless it drops that capability.
    unprivileged = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if unprivileged and not shutil.which("setpriv"):
        pytest.skip("running as root without setpriv (util-linux)")
    folders = [f for f in Path(filled_store.directory).rglob("*") if f.is_dir()]
    for folder in (Path(filled_store.directory), *folders):
        folder.chmod(0o555)
    code = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from store_rows import KEYS, SPACE, check_rows, make_rows
from sktl import FeatureStore
store = FeatureStore({str(filled_store.directory)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for key in (b"a", b"b"):
        store.put(SPACE, [key * 32], make_rows([key]))
    store.put({{"backbone": "other"}}, KEYS, make_rows(KEYS))
check_rows(store)
assert len(caught) == 1, caught
assert "Permission denied" in str(caught[0].message), caught[0]
"""
    subprocess.run([*unprivileged, sys.executable, "-c", code], check=True)


def test_directory_that_is_a_file_raises(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for use in (lambda store: store.get(SPACE, KEYS), FeatureStore.info):
        with pytest.raises(ValueError, match=r"memory must be a directory.*is a file"):
            use(FeatureStore(file))


def test_namespaces_distinguish_types_of_equal_values(tmp_path):
    store = FeatureStore(tmp_path)
    folders = {store._index({"layer": value}).folder for value in (1, True, 1.0, "1")}
    assert len(folders) == 4
    assert store._index({"a": "1", "b": "2"}) is store._index({"b": "2", "a": "1"})


@pytest.mark.parametrize("up", [0, 1, 2])
def test_deleted_directory_is_created_again(filled_store, up):
    folder = filled_store._index(SPACE).folder
    shutil.rmtree([folder, *folder.parents][up])
    positions, _ = filled_store.get(SPACE, KEYS)
    assert len(positions) == 0
    assert filled_store.info()["rows"] == 0
    filled_store.put(SPACE, KEYS, make_rows(KEYS))
    check_rows(filled_store)


def test_pickle_holds_parameters_only(filled_store):
    copy = pickle.loads(pickle.dumps(filled_store))
    assert vars(copy) == {"directory": filled_store.directory, "max_bytes": None}
    check_rows(copy)
    assert repr(copy) == f"FeatureStore({str(filled_store.directory)!r})"


@pytest.mark.parametrize(
    ("keys", "rows", "reason"),
    [
        ([b"short"], make_rows(KEYS[:1]), "32 bytes"),
        (["s" * 32], make_rows(KEYS[:1]), "32 bytes"),
        (KEYS[:1], np.ones((1, 0), "f4"), "array of floats"),
        (KEYS[:1], [[1, 2]], "array of floats"),
        (KEYS[:2], make_rows(KEYS[:1]), "a row for each of 2"),
        (KEYS[:1], np.ones((1, 3), int), "array of floats"),
        (KEYS[:1], np.full((1, 3), np.nan, "f4"), "finite"),
        ([b"n" * 32], make_rows(KEYS[:1], 9), "same shape and dtype"),
    ],
)
def test_invalid_rows_raise(filled_store, keys, rows, reason):
    with pytest.raises(ValueError, match=reason):
        filled_store.put(SPACE, keys, rows)


@pytest.mark.parametrize("directory", ["", "a\0b"])
def test_invalid_directory_name_raises(directory):
    with pytest.raises(ValueError, match="must be the name of a directory"):
        FeatureStore(directory)


def test_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    FeatureStore("~/store").put(SPACE, KEYS, make_rows(KEYS))
    assert len(find_shards(tmp_path / "store")) == 1


def test_too_long_name_warns(tmp_path):
    store = FeatureStore(tmp_path / ("x" * 300))
    with pytest.warns(UserWarning, match="cannot be written"):
        store.put(SPACE, KEYS, make_rows(KEYS))


@pytest.mark.parametrize("name", ["absent", "file"])
def test_command_line_needs_a_directory(tmp_path, capsys, name):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path / name), "info"])
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("max_bytes", [0, -1, "1GB", 1e9, float("nan"), True])
def test_invalid_max_bytes_raises(max_bytes):
    with pytest.raises(ValueError, match="max_bytes must be a positive integer"):
        FeatureStore("anywhere", max_bytes=max_bytes)


@pytest.mark.parametrize("directory", [None, True, 3, b"bytes"])
def test_directory_of_invalid_type_raises(directory):
    with pytest.raises(TypeError, match="directory must be a str or a path"):
        FeatureStore(directory)


def test_import_does_not_import_torch():
    code = "import sys, sktl.store; sys.exit('torch' in sys.modules)"
    folder = Path(sktl.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "\0"])
def test_damaged_description_is_reported_as_unknown(filled_store, text):
    next(Path(filled_store.directory).rglob("space.json")).write_text(text)
    assert filled_store.info()["rows"] == 40
    assert [each["space"] for each in filled_store.info()["spaces"].values()] == [
        {"unknown": "unknown"}
    ]
