"""
=======================================
A feature store with ten million images
=======================================

Fills a store on one disk as a fleet of workers would, a few hundred rows at a time,
then opens it in a fresh process and reads. Prints what `docs/scaling.md` says: rows a
second, files, bytes, the memory of whoever has looked in, and calls to the file system,
as counted by the Python functions that make them.

::

    python examples/benchmarks/store_at_scale.py --rows 10_000_000 --directory DIR
"""

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from sktl import FeatureStore

SPACE = {"benchmark": "ten million"}
MILLION = 10**6


def keys_of(start: int, stop: int) -> list[bytes]:
    """Give the keys of images that do not exist."""
    return [hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(start, stop)]


def fill(store: FeatureStore, n: int, width: int, chunk: int) -> None:
    """Put rows, and print how it goes."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(chunk, width)).astype(np.float32)
    calls: Counter[str] = Counter()
    # An open, a rename, a list or a removal is what a file server is asked for.
    sys.addaudithook(lambda event, _: calls.update([event] if event in ASKED else []))
    begin = last = time.perf_counter()
    longest, told = 0.0, 0
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        keys = keys_of(start, stop)
        before = time.perf_counter()
        store.put(SPACE, keys, rows[: stop - start])
        longest = max(longest, time.perf_counter() - before)
        if stop // MILLION > start // MILLION or stop == n:
            rate = (stop - told) / (time.perf_counter() - last)
            print(
                f"{stop:,} rows: the last {rate:,.0f} a second, longest put "
                f"{longest:.2f} s, {memory():.2f} GB of memory",
                flush=True,
            )
            last, longest, told = time.perf_counter(), 0.0, stop
    seconds = time.perf_counter() - begin
    print(f"all: {n / seconds:,.0f} rows a second")
    per_row = {event: f"{n_calls / n:.4f}" for event, n_calls in calls.items()}
    print(f"asked of the file system, for each row: {per_row}")


ASKED = {"open", "os.rename", "os.scandir", "os.listdir", "os.remove", "os.mkdir"}


def memory() -> float:
    """Give the resident memory of this process, in GB."""
    return psutil.Process().memory_info().rss / 1e9


def lookup(directory: str, n: int) -> None:
    """Open a full store in a process that has not seen it, and read."""
    before = memory()
    store = FeatureStore(directory)
    rng = np.random.default_rng(1)
    begin = time.perf_counter()
    store.get(SPACE, keys_of(0, 1))
    opened = time.perf_counter() - begin
    print(f"first look: {opened:.1f} s, then {memory() - before:.2f} GB more memory")
    for what, count in (("random", 10_000), ("the same", 10_000)):
        if what == "random":
            wanted = [keys_of(i, i + 1)[0] for i in rng.integers(0, n, count).tolist()]
        begin = time.perf_counter()
        positions, _ = store.get(SPACE, wanted)
        seconds = time.perf_counter() - begin
        print(f"{len(positions):,} {what} rows: {seconds:.2f} s")
    begin = time.perf_counter()
    for _ in range(100):
        store.get(SPACE, wanted[:32])
    print(f"32 rows, known: {10 * (time.perf_counter() - begin):.2f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A store of ten million rows")
    parser.add_argument("--rows", type=int, default=10 * MILLION)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--directory", type=Path, help="where there is room")
    parser.add_argument("--look", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        lookup(arguments.look, arguments.rows)
        return
    print(
        f"{arguments.rows:,} rows of {arguments.width} float32, {arguments.chunk} at a "
        f"time, {platform.machine()}, Python {platform.python_version()}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        fill(FeatureStore(directory), arguments.rows, arguments.width, arguments.chunk)
        shards = list(Path(directory).rglob("*.safetensors"))
        size = sum(os.path.getsize(shard) for shard in shards)
        plain = 4 * arguments.rows * arguments.width
        print(
            f"{len(shards)} files, {size / 1e9:.2f} GB, {size / plain - 1:.1%} more "
            "than the rows",
            flush=True,
        )
        again = [sys.executable, __file__, "--look", directory]
        subprocess.run([*again, "--rows", str(arguments.rows)], check=True)


if __name__ == "__main__":
    main()
