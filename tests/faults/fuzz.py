"""Damage files of one kind at random, give them to sktl, and see its promises kept.

``python tests/faults/fuzz.py KIND --cases 10000 --seed 0``

KIND is images, weights, shards, models or checkpoints. Whatever is in a file, it is
refused with the documented exception, or read and then right. It never ends the
process, runs for ever, takes the memory of the machine, leaves a file open, or is
executed. Where it does, this program says which case it was, keeps its input, and
exits with 1. ``--first N --cases N+1`` runs that case alone.
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

# What it may take more than what the process has when the first case begins.
MOST_BYTES = 3 * 2**29
HANGS = 60.0  # seconds; most cases take a millisecond
# Of Python's audit events, those that no file may cause.
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


def subject_of(kind, folder):
    """Give what is fuzzed: it has ``case(rng)``, which says what came of it."""
    import fuzz_files
    import fuzz_shards
    import fuzz_training

    kinds = {
        "images": fuzz_files.ImageSequence,
        "weights": fuzz_files.WeightsFiles,
        "shards": fuzz_shards.Shards,
        "models": fuzz_training.Models,
        "checkpoints": fuzz_training.Checkpoints,
    }
    return kinds[kind](folder)


def main(subject_of=subject_of):
    """Run all cases in a process of their own, and say how that ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hangs", type=float, default=HANGS, help="seconds of a case")
    parser.add_argument("--keep", type=Path, default=Path(), help="for bad inputs")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        run(given, subject_of)
        return
    # In memory where that is possible: a disk takes ten times as long.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, *sys.argv, "--inside", folder]
        code = subprocess.run(command).returncode
        if code:
            sys.exit(_kept(given, Path(folder), code))


def _kept(given, folder, code):
    """Keep the input of the last case; say where it is."""
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


def run(given, subject_of):
    """Run the cases, one after the other, each from seed and number alone."""
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of damage, as documented
    subject = subject_of(given.kind, given.inside)
    outcomes, broken = Counter(), _watch()
    (given.inside / "input").mkdir(exist_ok=True)
    subject.case(random.Random("imports what comes late"))
    gc.collect()
    gc.freeze()  # what is here stays: collecting looks at the rest only
    _limit_memory()
    with open(given.inside / "number", "w") as number:
        n_trainable, began = _n_trainable(), time.perf_counter()
        for case in range(given.first, given.cases):
            os.pwrite(number.fileno(), b"%012d" % case, 0)
            faulthandler.dump_traceback_later(given.hangs, exit=True)
            outcomes[subject.case(random.Random(f"{given.seed} {case}"))] += 1
            if broken:
                raise AssertionError(f"Something was executed: {broken}")
            if _n_trainable() > n_trainable:
                gc.collect()  # what an exception held
                if _n_trainable() > n_trainable:
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
    """Give a list that tells from now on what was executed."""
    broken = []

    def hook(event, arguments):
        if event.startswith(FORBIDDEN):
            broken.append((event, arguments))

    sys.addaudithook(hook)
    return broken


def _n_trainable():
    return len(os.listdir("/dev/fd"))


def _limit_memory():
    """Let more than a generous amount of memory be a MemoryError."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except FileNotFoundError:
        return  # where there is no /proc, RLIMIT_AS is seldom obeyed
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
