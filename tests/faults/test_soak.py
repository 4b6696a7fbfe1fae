"""Short runs of `soak.py`: it passes, and it detects each kind of leak."""

import contextlib
import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soak

PROGRAM = Path(soak.__file__)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        pytest.param("fits", 6, marks=pytest.mark.slow),
        pytest.param("images", 2000, marks=pytest.mark.slow),
        pytest.param("searches", 6, marks=pytest.mark.slow),
    ],
)
def test_no_resource_leaks(what, number):
    command = [sys.executable, PROGRAM, what, str(number)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "what",
    [
        "memory",
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in ("files", "threads", "temporary")
        ),
    ],
)
def test_a_leak_is_detected(what, tmp_path, monkeypatch):
    monkeypatch.setattr(soak.tempfile, "tempdir", str(tmp_path))
    kept, end = [], threading.Event()

    def leaking(stack):
        for i in range(6):
            if what == "memory":
                # More than malloc ever takes from memory that was freed before.
                kept.append(np.ones(5_000_000))
            elif what == "files":
                stack.enter_context(open(__file__))
            elif what == "threads":
                threading.Thread(target=end.wait).start()
            else:
                (tmp_path / str(i)).touch()
            yield i

    with contextlib.ExitStack() as stack:
        gc.freeze()  # each count collects garbage, without the objects of other tests
        stack.callback(gc.unfreeze)
        stack.callback(end.set)
        grown = soak.soak("a leak", leaking(stack))
    assert [line for line in grown if f" {what} " in line]
