"""
==========================================
Benchmark cached features in a grid search
==========================================

A search over 10 values of C in 5 folds is run three times: without a cache, with
scikit-learn's ``Pipeline(memory=...)``, and with ``memory`` of `PretrainedFeatures`.
The last is repeated with all features cached, and the fraction of its time spent in
sktl is measured. Finally, `FeatureStore` is measured alone.

::

    python examples/benchmarks/grid_search.py --data FOLDER --weights FILE
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktl import FeatureStore, PretrainedFeatures

NAMESPACE = {"benchmark": "rows"}


def searched(arguments, X, y, *, memory=None, pipeline_memory=None) -> list[float]:
    """Return the time of the search, and the part spent in `PretrainedFeatures`."""
    features = PretrainedFeatures(
        arguments.backbone, weights=arguments.weights, memory=memory
    )
    model = make_pipeline(
        features,
        StandardScaler(),
        LogisticRegression(max_iter=1000),
        memory=pipeline_memory,
    )
    grid = {"logisticregression__C": np.logspace(-3, 2, 10)}
    inside = 0.0

    def timed(method):
        def wrapper(*args, **keywords):
            nonlocal inside
            start = time.perf_counter()
            try:
                return method(*args, **keywords)
            finally:
                inside += time.perf_counter() - start

        return wrapper

    start = time.perf_counter()
    with (
        mock.patch.object(PretrainedFeatures, "fit", timed(PretrainedFeatures.fit)),
        mock.patch.object(
            PretrainedFeatures, "transform", timed(PretrainedFeatures.transform)
        ),
    ):
        GridSearchCV(model, grid, cv=5).fit(X, y)
    return [time.perf_counter() - start, inside]


def store_alone(directory: str) -> None:
    """Time writing and reading of 100,000 rows of 512 floats."""
    n, width, chunk = 100_000, 512, 256
    rng = np.random.default_rng(0)
    keys = [rng.bytes(32) for _ in range(n)]
    rows = rng.normal(size=(n, width)).astype(np.float32)
    store = FeatureStore(directory)
    puts = []
    for start in range(0, n, chunk):
        began = time.perf_counter()
        store.put(NAMESPACE, keys[start : start + chunk], rows[start : start + chunk])
        puts.append(time.perf_counter() - began)
    size = store.info()["bytes"]
    wanted = rng.permutation(n)[:10_000]
    gets = []
    for _ in range(3):
        began = time.perf_counter()
        _, got = store.get(NAMESPACE, [keys[i] for i in wanted])
        gets.append(time.perf_counter() - began)
    assert np.array_equal(got, rows[wanted])
    median, most = 1000 * np.percentile(puts, [50, 100])
    print(f"put of {chunk} rows: median {median:.1f} ms, longest {most:.0f} ms")
    print(
        f"get of 10,000 rows of {n:,}: {gets[0]:.2f} s from disk, then {gets[-1]:.3f} s"
    )
    print(f"on disk: {size / rows.nbytes - 1:.1%} more than the rows")


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description="Benchmark cached features")
    parser.add_argument("--data", type=Path, required=True, help="one folder per class")
    parser.add_argument("--backbone", default="squeezenet1_1")
    parser.add_argument("--weights", default=None, help="default: random, same time")
    arguments = parser.parse_args()
    photos = load_files(arguments.data, load_content=False)
    X, y = photos.filenames, photos.target
    print(
        f"{arguments.backbone}, {len(X)} images, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, scikit-learn "
        f"{sklearn.__version__}"
    )
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = f"{directory}/ours", f"{directory}/theirs"
        first, inside = searched(arguments, X, y, memory=ours)
        print(f"memory: {first:.1f} s, {inside / first:.0%} of it in sktl")
        # Repeated, because it is short, and a cache that was written within the last
        # two seconds is listed in each call.
        again = [searched(arguments, X, y, memory=ours) for _ in range(15)]
        share = np.percentile([inside / total for total, inside in again], [50, 0, 100])
        seconds = np.median([total for total, _ in again])
        print(
            f"memory, again: {seconds:.2f} s, of it in sktl {share[0]:.1%}, from "
            f"{share[1]:.1%} to {share[2]:.1%}, 15 times"
        )
        pipeline, _ = searched(arguments, X, y, pipeline_memory=theirs)
        print(f"Pipeline(memory=...): {pipeline:.1f} s, ratio {pipeline / first:.1f}")
        without, _ = searched(arguments, X, y)
        print(f"without: {without:.1f} s, ratio {without / first:.1f}")
        store_alone(f"{directory}/alone")


if __name__ == "__main__":
    main()
