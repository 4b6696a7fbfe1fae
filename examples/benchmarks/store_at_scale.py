"""
================================================
Benchmark a FeatureStore with ten million images
================================================

The benchmark writes rows to a store on one disk, a few hundred at a time as workers
would, then opens it in a new process and reads. It prints the values in
``docs/scaling.md``: rows per second, number and size of the files, memory of the
processes, and file system operations, counted by audit events of Python.

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

NAMESPACE = {"benchmark": "ten million"}
MILLION = 10**6


def keys_of(start: int, stop: int) -> list[bytes]:
    """Return keys of fictitious images."""
    return [hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(start, stop)]


def fill(store: FeatureStore, n: int, width: int, chunk: int) -> None:
    """Write rows and print the progress."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(chunk, width)).astype(np.float32)
    calls: Counter[str] = Counter()
    # Opens, renames, lists and removals are requests to a file server.
    sys.addaudithook(lambda event, _: calls.update([event] if event in EVENTS else []))
    begin = last = time.perf_counter()
    longest, reported = 0.0, 0
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        keys = keys_of(start, stop)
        before = time.perf_counter()
        store.put(NAMESPACE, keys, rows[: stop - start])
        longest = max(longest, time.perf_counter() - before)
        if stop // MILLION > start // MILLION or stop == n:
            rate = (stop - reported) / (time.perf_counter() - last)
            print(
                f"{stop:,} rows: {rate:,.0f} rows/s since the last line, longest put "
                f"{longest:.2f} s, {memory():.2f} GB of memory",
                flush=True,
            )
            last, longest, reported = time.perf_counter(), 0.0, stop
    seconds = time.perf_counter() - begin
    print(f"all: {n / seconds:,.0f} rows/s")
    per_row = {event: f"{n_calls / n:.4f}" for event, n_calls in calls.items()}
    print(f"file system operations per row: {per_row}")


EVENTS = {"open", "os.rename", "os.scandir", "os.listdir", "os.remove", "os.mkdir"}


def memory() -> float:
    """Return the resident memory of this process in GB."""
    return psutil.Process().memory_info().rss / 1e9


def lookup(directory: str, n: int) -> None:
    """Open a full store in a new process, and read rows."""
    before = memory()
    store = FeatureStore(directory)
    rng = np.random.default_rng(1)
    begin = time.perf_counter()
    store.get(NAMESPACE, keys_of(0, 1))
    opened = time.perf_counter() - begin
    print(f"first lookup: {opened:.1f} s, {memory() - before:.2f} GB more memory")
    for label, count in (("random", 10_000), ("the same", 10_000)):
        if label == "random":
            wanted = [keys_of(i, i + 1)[0] for i in rng.integers(0, n, count).tolist()]
        begin = time.perf_counter()
        positions, _ = store.get(NAMESPACE, wanted)
        seconds = time.perf_counter() - begin
        print(f"{len(positions):,} {label} rows: {seconds:.2f} s")
    begin = time.perf_counter()
    for _ in range(100):
        store.get(NAMESPACE, wanted[:32])
    print(f"32 cached rows: {10 * (time.perf_counter() - begin):.2f} ms")


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description="Benchmark a large store")
    parser.add_argument("--rows", type=int, default=10 * MILLION)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--directory", type=Path, help="on a disk with enough space")
    parser.add_argument("--lookup", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lookup:
        lookup(arguments.lookup, arguments.rows)
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
        again = [sys.executable, __file__, "--lookup", directory]
        subprocess.run([*again, "--rows", str(arguments.rows)], check=True)


if __name__ == "__main__":
    main()
