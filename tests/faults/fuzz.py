"""Fuzz the readers of one kind of file: damage files at random and read them.

``python tests/faults/fuzz.py KIND --cases 10000 --seed 0``

KIND is images, weights, shards, models, checkpoints, or all of them mixed. A damaged
file must raise the documented exception, or be read correctly. It must never end the
process, hang, exhaust the memory, leave a file open, or execute code. If a case breaks
one of these rules, this program prints its number, keeps its input, and exits with 1.
``--first N --cases N+1`` runs case N alone.
"""

import argparse
import faulthandler
import gc
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

# Memory limit, in addition to what the process uses when the first case begins.
MAX_BYTES = 3 * 2**29
TIMEOUT = 60.0  # seconds of a case; most cases take a millisecond
# Prefixes of Python's audit events that no file may cause.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "os.putenv",
    "ctypes.dlopen",
)


def make_subject(kind, folder):
    """Return the object to fuzz, whose ``case(rng)`` returns the outcome of a case."""
    import fuzz_files
    import fuzz_shards
    import fuzz_training

    kinds = {
        "images": fuzz_files.ImageFiles,
        "weights": fuzz_files.WeightsFiles,
        "shards": fuzz_shards.Shards,
        "models": fuzz_training.Models,
        "checkpoints": fuzz_training.Checkpoints,
    }
    if kind == "all":
        return Mixed({name: make(folder) for name, make in kinds.items()})
    return kinds[kind](folder)


class Mixed:
    """All kinds of files, each case of one of them."""

    def __init__(self, subjects):
        self.subjects = subjects

    def case(self, rng):
        """Choose a kind, and run a case of it."""
        kind = rng.choice(sorted(self.subjects))
        return f"{kind}: {self.subjects[kind].case(rng)}"


def main(make_subject=make_subject):
    """Run all cases in a separate process, and report how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hangs", type=float, default=TIMEOUT, help="timeout of a case in seconds"
    )
    parser.add_argument("--keep", type=Path, default=Path(), help="for bad inputs")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        run(given, make_subject)
        return
    # In memory where that is possible: a disk takes ten times as long.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, *sys.argv, "--inside", folder]
        code = subprocess.run(command).returncode
        if code:
            sys.exit(_kept(given, Path(folder), code))


def _kept(given, folder, code):
    """Keep the input of the last case; return a message with its path."""
    number = folder / "number"
    if not number.exists():
        return f"{given.kind}: ended with {code} before the first case"
    name = f"fuzz-{given.kind}-{given.seed}-{int(number.read_text())}"
    kept = (given.keep / name).absolute()
    shutil.copytree(folder / "input", kept, dirs_exist_ok=True)
    return (
        f"{given.kind}: case {int(number.read_text())} of seed {given.seed} broke a "
        f"promise; the process ended with {code}. Its input is in {kept}"
    )


def run(given, make_subject):
    """Run the cases in order; seed and number determine each of them."""
    faulthandler.enable()
    warnings.simplefilter("ignore")  # damage is warned about, as documented
    subject = make_subject(given.kind, given.inside)
    outcomes, broken = Counter(), _watch()
    (given.inside / "input").mkdir(exist_ok=True)
    subject.case(random.Random("lazy imports"))
    gc.collect()
    gc.freeze()  # collecting skips these objects, and is quick
    _limit_memory()
    with open(given.inside / "number", "w") as number:
        n_open, began = _count_open_files(), time.perf_counter()
        for case in range(given.first, given.cases):
            os.pwrite(number.fileno(), b"%012d" % case, 0)
            faulthandler.dump_traceback_later(given.hangs, exit=True)
            outcomes[subject.case(random.Random(f"{given.seed} {case}"))] += 1
            if broken:
                raise AssertionError(f"Something was executed: {broken}")
            if _count_open_files() > n_open:
                gc.collect()  # files that an exception referenced
                if _count_open_files() > n_open:
                    raise AssertionError("A file was left open.")
    faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - began
    n = given.cases - given.first
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{given.kind}: {n} cases in {seconds:.1f} s, {n / seconds:.0f} a second, at "
        f"most {peak} MB"
    )
    for outcome, count in outcomes.most_common():
        print(f"{count:8} {outcome}")


def _watch():
    """Return a list to which forbidden audit events are appended from now on."""
    broken = []

    def hook(event, arguments):
        if event.startswith(FORBIDDEN):
            broken.append((event, arguments))

    sys.addaudithook(hook)
    return broken


def _count_open_files():
    return len(os.listdir("/dev/fd"))


def _limit_memory():
    """Raise a MemoryError above a generous amount of memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except FileNotFoundError:
        return  # where there is no /proc, RLIMIT_AS is seldom obeyed
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
