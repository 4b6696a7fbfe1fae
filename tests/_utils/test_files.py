"""Tests of atomic file writes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sktl._utils.files import write_atomically

OLD, NEW = b"old content", b"new" * 10_000


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "state.bin"
    file.write_bytes(OLD)
    return file


def test_content_is_written_and_no_other_file(file):
    write_atomically(file, NEW)
    write_atomically(file.with_name("empty"), b"")
    assert file.read_bytes() == NEW
    assert file.with_name("empty").read_bytes() == b""
    assert sorted(os.listdir(file.parent)) == ["empty", "state.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_failed_write_leaves_old_file(file, monkeypatch, step, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(*((os, step) if step == "fsync" else (Path, step)), fail)
    with pytest.raises(type(error)):
        write_atomically(file, NEW)
    assert file.read_bytes() == OLD
    assert os.listdir(file.parent) == [file.name]


def test_content_is_on_disk_before_the_rename(file, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        assert os.fstat(descriptor).st_size == len(NEW)
        steps.append("fsync")
        fsync(descriptor)

    def noted_replace(source, target):
        assert source.parent == target.parent  # a rename across disks is a copy
        steps.append("replace")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomically(file, NEW)
    assert steps == ["fsync", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_writer_leaves_old_file(file, step):
    module = "os" if step == "fsync" else "Path"
    code = f"""
import os, signal, sys
from pathlib import Path
from sktl._utils.files import write_atomically
{module}.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"new" * 10_000)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(file)])
    assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() == OLD
    (partial,) = [f for f in file.parent.iterdir() if f != file]
    assert partial.suffix == ".tmp"
    write_atomically(file, NEW)
    assert file.read_bytes() == NEW
