"""
==================================
Extract features on a Dask cluster
==================================

Three ways to distribute the computation, from the simplest to the largest data:

- one call of ``transform``, whose images are distributed over the workers;
- a grid search, whose candidates are distributed, with a shared ``memory``;
- a Dask array of paths, mapped block by block to a Dask array of features, which is
  written to Parquet and may be larger than memory.

::

    python examples/features_on_dask.py

starts two workers on this machine and uses scanned digits. ``--data FOLDER --backbone
resnet18`` uses your own images, in one folder per class. To use an existing cluster,
replace ``LocalCluster(...)`` by the address of its scheduler. For one GPU per worker,
start the workers with ``--resources GPU=1`` and ``--nthreads 1``, and use
``joblib.parallel_config("dask", resources={"GPU": 1})``.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask.array as da
import dask.dataframe as dd
import joblib
import numpy as np
from dask.distributed import Client, LocalCluster
from PIL import Image
from sklearn.datasets import load_digits, load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktl import FeatureStore, PretrainedFeatures


def digits(folder: Path, n: int) -> tuple[list[str], np.ndarray]:
    """Write `n` scanned digits to files; return their paths and labels."""
    X, y = load_digits(return_X_y=True)
    paths = [str(folder / f"{i}.png") for i in range(n)]
    for path, image in zip(paths, X, strict=False):
        Image.fromarray((image.reshape(8, 8) * 255 / 16).astype(np.uint8)).save(path)
    return paths, y[:n]


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Print the time of a block."""
    start = time.perf_counter()
    yield
    print(f"{label}: {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    """Compute features in three ways, and compare them."""
    parser = argparse.ArgumentParser(description="Extract features on a Dask cluster")
    parser.add_argument("--data", type=Path, help="one folder per class")
    parser.add_argument("--backbone", default="resnet_mini")
    parser.add_argument("--digits", type=int, default=600)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster),
    ):
        if arguments.data is None:
            paths, y = digits(Path(scratch), arguments.digits)
        else:
            files = load_files(arguments.data, load_content=False, random_state=0)
            paths, y = list(files.filenames), files.target
        memory = Path(scratch) / "memory"
        features = PretrainedFeatures(arguments.backbone, memory=memory)

        with joblib.parallel_config("dask"), timed(f"{len(paths)} images, one call"):
            rows = features.set_params(n_jobs=-1).transform(paths)

        # The search distributes the candidates, so n_jobs of the transformer is None.
        model = make_pipeline(
            features.set_params(n_jobs=None),
            StandardScaler(),
            LogisticRegression(max_iter=1000),
        )
        grid = {"logisticregression__C": [0.001, 0.01, 0.1]}
        with joblib.parallel_config("dask"), timed("a search, with cached features"):
            search = GridSearchCV(model, grid, cv=3, n_jobs=-1).fit(paths, y)
        print(f"accuracy {search.best_score_:.3f} with {search.best_params_}")
        print(f"cached rows: {FeatureStore(memory).info()['rows']}")

        # Each block of paths is one task, which returns one block of features.
        blocks = da.from_array(np.array(paths), chunks=100)
        table = blocks.map_blocks(
            features.transform,
            new_axis=1,
            chunks=(blocks.chunks[0], (rows.shape[1],)),
            meta=np.empty((0, 0), dtype=np.float32),
        )
        names = list(features.fit(paths).get_feature_names_out())
        with timed("a Dask array, written to Parquet"):
            dd.from_dask_array(table, columns=names).to_parquet(f"{scratch}/features")
        back = dd.read_parquet(f"{scratch}/features").compute()
        print(f"equal to the rows of the first call: {np.array_equal(back, rows)}")


if __name__ == "__main__":
    main()
