"""
=================================
Extract features on a Ray cluster
=================================

Three ways to distribute the computation, from the simplest to the largest data:

- one call of ``transform``, whose images are distributed over the workers;
- a grid search, whose candidates are distributed, with a shared ``memory``;
- a Ray dataset of paths, mapped by a callable class that holds the network, and written
  to Parquet; it may be larger than memory.

::

    python examples/features_on_ray.py

starts two workers on this machine and uses scanned digits. ``--data FOLDER --backbone
resnet18`` uses your own images, in one folder per class. To use an existing cluster,
call ``ray.init(address="auto")``. For one GPU per worker, pass ``num_gpus=1`` in
``ray_remote_args`` and to ``map_batches``.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import ray
from PIL import Image
from ray.util.joblib import register_ray
from sklearn.datasets import load_digits, load_files
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktl import FeatureStore, PretrainedFeatures

# Without these options, a lost worker makes the whole call fail.
RETRY = {"max_restarts": -1, "max_task_retries": -1}


class Features:
    """Callable for ``map_batches``: each worker loads the network once."""

    def __init__(self, backbone: str, memory: Path) -> None:
        self.features = PretrainedFeatures(backbone, memory=memory)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the features to a batch of paths."""
        return {**batch, "features": self.features.transform(batch["path"])}


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


@contextmanager
def on_ray(label: str) -> Iterator[None]:
    """Run a block with Ray as joblib's backend, and print its time."""
    with joblib.parallel_config("ray", ray_remote_args=RETRY), timed(label):
        yield


def main() -> None:
    """Compute features in three ways, and compare them."""
    parser = argparse.ArgumentParser(description="Extract features on a Ray cluster")
    parser.add_argument("--data", type=Path, help="one folder per class")
    parser.add_argument("--backbone", default="resnet_mini")
    parser.add_argument("--digits", type=int, default=600)
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data is None:
            paths, y = digits(Path(scratch), arguments.digits)
        else:
            files = load_files(arguments.data, load_content=False, random_state=0)
            paths, y = list(files.filenames), files.target
        memory = Path(scratch) / "memory"
        features = PretrainedFeatures(arguments.backbone, memory=memory)

        with on_ray(f"{len(paths)} images, one call"):
            rows = features.set_params(n_jobs=-1).transform(paths)

        # The search distributes the candidates, so n_jobs of the transformer is None.
        model = make_pipeline(
            features.set_params(n_jobs=None),
            StandardScaler(),
            LogisticRegression(max_iter=1000),
        )
        grid = {"logisticregression__C": [0.001, 0.01, 0.1]}
        with on_ray("a search, with cached features"):
            search = GridSearchCV(model, grid, cv=3, n_jobs=-1).fit(paths, y)
        print(f"accuracy {search.best_score_:.3f} with {search.best_params_}")
        print(f"cached rows: {FeatureStore(memory).info()['rows']}")

        table = ray.data.from_items([{"path": path} for path in paths]).map_batches(
            Features,
            fn_constructor_args=(arguments.backbone, memory),
            batch_size=100,
            concurrency=2,
        )
        with timed("a Ray dataset, written to Parquet"):
            table.write_parquet(f"{scratch}/features")
        back = ray.data.read_parquet(f"{scratch}/features").to_pandas()
        back = np.stack(back.set_index("path").loc[paths, "features"])
        print(f"equal to the rows of the first call: {np.array_equal(back, rows)}")
    ray.shutdown()


if __name__ == "__main__":
    main()
