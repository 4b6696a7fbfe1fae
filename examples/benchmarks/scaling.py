"""
=======================
Two workers against one
=======================

``transform`` of the same pictures, spread over one worker process and over two, each
with one thread, on a cluster of Dask and of Ray on this machine. The time to start a
worker and to load the network is not in it, for the pictures of the first call are few.

::

    python examples/benchmarks/scaling.py --data FOLDER --backbone resnet18

``FOLDER`` holds a folder per class. The photographs are repeated until they are as many
as asked for; nothing is remembered. Weights are random: they do not change the time.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before torch and OpenVINO are imported, here and in the workers.
os.environ["OMP_NUM_THREADS"] = "1"

import joblib
import numpy as np
import torch
from sklearn.datasets import load_files

from sktl import PretrainedFeatures


@contextmanager
def on_dask(n_workers: int) -> Iterator[None]:
    """Start a cluster of Dask, and let joblib use it."""
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster),
        joblib.parallel_config("dask"),
    ):
        yield


@contextmanager
def on_ray(n_workers: int) -> Iterator[None]:
    """Start a cluster of Ray, and let joblib use it."""
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=n_workers, include_dashboard=False, log_to_driver=False)
    register_ray()
    with joblib.parallel_config("ray"):
        yield
    ray.shutdown()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Two workers against one")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--engines", nargs="+", default=["dask", "ray"])
    arguments = parser.parse_args()
    files = load_files(arguments.data, load_content=False, random_state=0)
    paths = np.resize(files.filenames, arguments.pictures).tolist()
    features = PretrainedFeatures(
        arguments.backbone, weights=None, precision=arguments.precision
    )
    expected = features.transform(paths[:64])
    print(
        f"{arguments.backbone}, {arguments.precision}, {len(paths)} pictures, "
        f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}"
    )
    features.set_params(n_jobs=2)
    for name in arguments.engines:
        rates = []
        for n_workers in (1, 2):
            with {"dask": on_dask, "ray": on_ray}[name](n_workers):
                features.transform(paths[:256])  # each worker loads the network
                start = time.perf_counter()
                rows = features.transform(paths)
                rates.append(len(paths) / (time.perf_counter() - start))
            assert np.array_equal(rows[:64], expected)
        one, two = rates
        print(
            f"{name}: one worker {one:.1f} pictures a second, two {two:.1f}: "
            f"{two / one:.2f} times as many",
            flush=True,
        )


if __name__ == "__main__":
    main()
