"""Detect resource leaks: repeat the same work and check that no resource grows.

``python tests/faults/soak.py images`` (or ``fits``, or ``searches``) repeats the work
`NUMBERS` times, or as often as an optional second argument; it takes some minutes. It
prints the resources of this process and its workers, and fails if the last third of the
run uses more of a resource than the second third. The first third fills the caches.

===========  =======================================================================
resource     tolerance for the growth from the median of one third to the next
===========  =======================================================================
memory       16 MB, the variation of the allocator between equal runs. A leak of
             0.5 kB per image, 250 kB per fit or 1 MB per search exceeds it
files        none: open file descriptors
threads      none
temporary    none: files left in the folder for temporary files, and in shared memory
             under the id of one of the processes
===========  =======================================================================
"""

import contextlib
import gc
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared_fixtures import TinyNet  # which registers "tiny" too

from sktl import FeatureStore, FineTunedCNNClassifier, PretrainedFeatures

NUMBERS = {"images": 100_000, "fits": 200, "searches": 50}
IMAGES_AT_ONCE = 500
N_NAMES = 1000  # of image files, which are overwritten repeatedly
STORE_BYTES = 2**20  # some thousand rows: most are evicted
SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Resources:
    """Resources of this process and its workers."""

    memory: float  # resident, MB
    files: float
    threads: float
    temporary: float


TOLERANCE = Resources(memory=16, files=0, threads=0, temporary=0)


def count_resources() -> Resources:
    """Count the resources after a garbage collection."""
    gc.collect()
    myself = psutil.Process()
    memory = files = threads = 0
    pids = {str(myself.pid)}
    for process in [myself, *myself.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory += process.memory_info().rss
            files += process.num_fds()
            threads += process.num_threads()
            pids.add(str(process.pid))
    entries = os.walk(tempfile.gettempdir())
    temporary = sum(len(folders) + len(names) for _, folders, names in entries)
    shared = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    temporary += sum(not pids.isdisjoint(re.findall(r"\d+", n)) for n in shared)
    return Resources(memory / 1e6, files, threads, temporary)


def paths(folder: Path, number: int) -> Iterator[str]:
    """Write random images to files whose names repeat, and yield their paths."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"{i % N_NAMES}.png"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
        yield str(path)


def images(number: int, folder: Path, memory: FeatureStore | None) -> Iterator[int]:
    """Extract features of images in batches of some hundred."""
    features = PretrainedFeatures("tiny", weights=None, memory=memory)
    coming = paths(folder, number)
    done = 0
    while some := list(itertools.islice(coming, IMAGES_AT_ONCE)):
        rows = features.transform(some)
        assert rows.shape[0] == len(some)
        done += len(some)
        yield done


def fits(number: int, folder: Path) -> Iterator[int]:
    """Fine-tune with other weights, another store and another depth each time."""
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (16, 20, 20, 3), np.uint8), np.repeat(["a", "b"], 8)
    for i in range(number):
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            weights = Path(inside) / "weights.safetensors"
            torch.manual_seed(i)
            save_file(TinyNet().state_dict(), weights)
            os.utime(weights, (i, i))
            classifier = FineTunedCNNClassifier(
                "tiny",
                weights=weights,
                trainable=("head", 1, "all")[i % 3],
                max_epochs=2,
                batch_size=8,
                memory=Path(inside) / "store",
                checkpoint=Path(inside) / "checkpoint",
                random_state=i,
            )
            assert classifier.fit(X, y).predict(X).shape == y.shape
        yield i + 1


def searches(number: int, folder: Path) -> Iterator[int]:
    """Run a grid search with two workers and another store each time."""
    y = np.repeat([0, 1], 15)
    for i in range(number):
        with tempfile.TemporaryDirectory(dir=folder) as store:
            features = PretrainedFeatures("resnet_mini", image_size=24, memory=store)
            model = make_pipeline(features, LogisticRegression())
            grid = {"pretrainedfeatures__layer": ["stage1", "penultimate"]}
            search = GridSearchCV(model, grid, cv=3, n_jobs=2)
            search.fit(list(paths(folder, len(y))), y)
            assert len(search.cv_results_["params"]) == 2
        yield i + 1


def soak(name: str, work: Iterator[int]) -> list[str]:
    """Do the work, print the resources, and return a line for each that has grown."""
    samples, begin, last = [], time.perf_counter(), 0.0
    for done in work:
        samples.append(count_resources())
        seconds = time.perf_counter() - begin
        if len(samples) == 1 or seconds - last > SECONDS_BETWEEN_LINES:
            print(f"{name}: {seconds:5.0f} s, {done:6d}: {samples[-1]}", flush=True)
            last = seconds
    print(f"{name}: {seconds:5.0f} s, {done:6d}: {samples[-1]}", flush=True)
    return growth(name, samples)


def growth(name: str, samples: list[Resources]) -> list[str]:
    """Compare the last third of a run with the second third."""
    third = len(samples) // 3
    grown = []
    columns = zip(*map(astuple, samples), strict=True)
    for field, column in zip(fields(Resources), columns, strict=True):
        before, after = median(column[third:-third]), median(column[-third:])
        line = f"{name}: {field.name} {before:.1f} -> {after:.1f}"
        print(line, flush=True)
        if after - before > getattr(TOLERANCE, field.name):
            grown.append(f"{line}, which exceeds the tolerance")
    return grown


def main(what: str, number: str = "") -> None:
    """Run one kind of work."""
    n = int(number or NUMBERS[what])
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as folder:
        # Workers read it from the environment.
        os.environ["TMPDIR"] = os.environ["JOBLIB_TEMP_FOLDER"] = tempfile.tempdir = own
        path = Path(folder)
        if what == "images":
            grown = soak("without memory", images(n, path, None))
            store = FeatureStore(path / "store", max_bytes=STORE_BYTES)
            grown += soak("with memory", images(n, path, store))
        else:
            grown = soak(what, {"fits": fits, "searches": searches}[what](n, path))
    sys.exit("\n".join(grown) or 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
