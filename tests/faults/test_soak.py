"""The soak, short: that it runs, and that it finds what grows."""

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soak

PROGRAM = Path(soak.__file__)


@pytest.mark.parametrize(
    ("what", "number"), [("images", 2000), ("fits", 6), ("searches", 6)]
)
def test_nothing_grows(what, number):
    command = [sys.executable, PROGRAM, what, str(number)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("what", ["memory", "files", "threads", "temporary"])
def test_what_grows_is_found(what, tmp_path, monkeypatch):
    monkeypatch.setattr(soak.tempfile, "tempdir", str(tmp_path))
    kept, end = [], threading.Event()

    def leaking(stack):
        for i in range(6):
            if what == "memory":
                kept.append(np.ones(2_000_000))
            elif what == "files":
                stack.enter_context(open(__file__))
            elif what == "threads":
                threading.Thread(target=end.wait).start()
            else:
                (tmp_path / str(i)).touch()
            yield i

    with contextlib.ExitStack() as stack:
        stack.callback(end.set)
        grown = soak.soak("a leak", leaking(stack))
    assert [line for line in grown if f" {what} " in line]
