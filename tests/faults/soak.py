"""Soak: the same work for a long time, after which nothing may have grown.

``python tests/faults/soak.py images`` (or ``fits``, or ``searches``) runs as many as
`NUMBERS` says, or as many as a number that follows; some minutes each. It prints what
this process and its workers hold, and fails if the last third of the run holds more of
anything than the third before. The first third is for caches to fill.

===========  =======================================================================
held         may grow from the median of one third to that of the next by
===========  =======================================================================
memory       16 MB: so much does the allocator move between equal runs. A leak of
             0.5 kB an image, 250 kB a fit or 1 MB a search exceeds it
files        nothing: open descriptors
threads      nothing
temporary    nothing: what is left in the folder for temporary files, and in shared
             memory under the number of one of the processes
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
from conftest import TinyNet  # which registers "tiny" too

from sktl import FeatureStore, FineTunedCNNClassifier, PretrainedFeatures

NUMBERS = {"images": 100_000, "fits": 200, "searches": 50}
IMAGES_AT_ONCE = 500
N_NAMES = 1000  # of image files; each is written again and again
STORE_BYTES = 2**20  # room for some thousand rows: most are evicted on the way
SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Held:
    """What this process and its workers hold."""

    memory: float  # resident, MB
    files: float
    threads: float
    temporary: float


TOLERANCE = Held(memory=16, files=0, threads=0, temporary=0)


def held() -> Held:
    """Count, after what is garbage is gone."""
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
    return Held(memory / 1e6, files, threads, temporary)


def paths(folder: Path, number: int) -> Iterator[str]:
    """Write images that differ, under names that come again, and name them."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"{i % N_NAMES}.png"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
        yield str(path)


def images(number: int, folder: Path, memory: FeatureStore | None) -> Iterator[int]:
    """Let images through a network, some hundred at a time."""
    features = PretrainedFeatures("tiny", weights=None, memory=memory)
    coming = paths(folder, number)
    done = 0
    while some := list(itertools.islice(coming, IMAGES_AT_ONCE)):
        rows = features.transform(some)
        assert rows.shape[0] == len(some)
        done += len(some)
        yield done


def fits(number: int, folder: Path) -> Iterator[int]:
    """Fine-tune: other weights, another store and another depth each time."""
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
    """Search a grid with two workers, each time with another store."""
    y = np.repeat([0, 1], 15)
    for i in range(number):
        with tempfile.TemporaryDirectory(dir=folder) as store:
            model = make_pipeline(
                PretrainedFeatures("resnet_mini", memory=store), LogisticRegression()
            )
            grid = {"pretrainedfeatures__layer": ["stage1", "penultimate"]}
            search = GridSearchCV(model, grid, cv=3, n_jobs=2)
            search.fit(list(paths(folder, len(y))), y)
            assert len(search.cv_results_["params"]) == 2
        yield i + 1


def soak(name: str, work: Iterator[int]) -> list[str]:
    """Do the work, print what is held meanwhile, and say what has grown."""
    samples, begin, last = [], time.perf_counter(), 0.0
    for done in work:
        samples.append(held())
        seconds = time.perf_counter() - begin
        if len(samples) == 1 or seconds - last > SECONDS_BETWEEN_LINES:
            print(f"{name}: {seconds:5.0f} s, {done:6d}: {samples[-1]}", flush=True)
            last = seconds
    print(f"{name}: {seconds:5.0f} s, {done:6d}: {samples[-1]}", flush=True)
    return growth(name, samples)


def growth(name: str, samples: list[Held]) -> list[str]:
    """Compare the last third of a run with the third before."""
    third = len(samples) // 3
    grown = []
    columns = zip(*map(astuple, samples), strict=True)
    for field, column in zip(fields(Held), columns, strict=True):
        before, after = median(column[third:-third]), median(column[-third:])
        said = f"{name}: {field.name} {before:.1f} -> {after:.1f}"
        print(said, flush=True)
        if after - before > getattr(TOLERANCE, field.name):
            grown.append(f"{said}, which is too much")
    return grown


def main(what: str, number: str = "") -> None:
    """Run."""
    n = int(number or NUMBERS[what])
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as folder:
        # Workers take it from the environment.
        os.environ["TMPDIR"] = os.environ["JOBLIB_TEMP_FOLDER"] = tempfile.tempdir = own
        where = Path(folder)
        if what == "images":
            grown = soak("without memory", images(n, where, None))
            store = FeatureStore(where / "store", max_bytes=STORE_BYTES)
            grown += soak("with memory", images(n, where, store))
        else:
            grown = soak(what, {"fits": fits, "searches": searches}[what](n, where))
    sys.exit("\n".join(grown) or 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
