"""Some cases of `fuzz.py`, of each kind; and that it reports what is broken.

By default a hundred cases; the mark ``slow`` adds thousands.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FUZZ = Path(__file__).with_name("fuzz.py")
CASES = {
    "images": 1500,
    "weights": 1500,
    "shards": 300,
    "models": 250,
    "checkpoints": 500,
}


def run(program, *arguments):
    """Run it in a process of its own."""
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


@pytest.mark.parametrize(("kind", "n"), CASES.items())
def test_damaged_files_break_nothing(tmp_path, kind, n):
    ended = run(FUZZ, kind, "--cases", n, "--keep", tmp_path, "--seed", 1)
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert f"{kind}: {n} cases" in ended.stdout
    counts = {
        outcome: int(count)
        for count, outcome in (
            line.split(None, 1) for line in ended.stdout.splitlines()[1:]
        )
    }
    assert sum(counts.values()) == n
    # Some files were read, and some were damaged.
    assert any(re.search("read|loaded|resumed", outcome) for outcome in counts)
    assert kind == "shards" or any("refused: ValueError" in name for name in counts)


BROKEN = {
    "raises": ("raise KeyError(rng)", "KeyError"),
    "crashes": ("os.abort()", "Aborted"),
    "hangs": ("time.sleep(30)", "Timeout"),
    "takes memory": ("np.ones(2**40, np.uint8)", "Unable to allocate"),
    "leaves files open": ("self.files.append(open(os.devnull))", "left open"),
    "executes": ("os.system('true')", "was executed"),
}
PROGRAM = """
import os, sys, time
import numpy as np
sys.path.insert(0, {folder!r})
import fuzz

class Broken:
    def __init__(self, folder):
        self.file, self.files = folder / "input" / "case", []
        self.number = -2  # one case comes before the first

    def case(self, rng):
        self.number += 1
        self.file.write_text(str(self.number))
        if self.number >= 3:
            {code}
        return "good"

fuzz.main(lambda kind, folder: Broken(folder))
"""


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_promise_is_reported(tmp_path, how):
    code, words = BROKEN[how]
    program = tmp_path / "broken.py"
    program.write_text(PROGRAM.format(folder=str(FUZZ.parent), code=code))
    ended = run(program, "x", "--cases", 9, "--hangs", 1, "--keep", tmp_path)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert "case 3 of seed 0 broke a promise" in ended.stderr
    assert (tmp_path / "fuzz-x-0-3" / "case").read_text() == "3"
    again = run(program, "x", "--first", 1, "--cases", 3, "--keep", tmp_path)
    assert again.returncode == 0
