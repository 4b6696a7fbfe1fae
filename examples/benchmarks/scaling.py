"""
=================================
Benchmark two workers against one
=================================

The benchmark runs ``transform`` on the same images with one and with two worker
processes of a local cluster, each with one thread and one processor, on Dask and on
Ray. The time to load the network is not included. The time in which Ray starts new
workers for each joblib call is included. The constant cost of a call is measured with
256 images and reported separately.

::

    python examples/benchmarks/scaling.py --data FOLDER --backbone resnet18

``FOLDER`` contains JPEG files, at any depth. They are repeated up to the given number.
Nothing is cached. Weights are random, which does not affect the time.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Before torch and OpenVINO are imported, here and in the workers.
os.environ["OMP_NUM_THREADS"] = "1"

import joblib
import numpy as np
import torch
from sklearn.base import clone

from sktl import PretrainedFeatures

Transform = Callable[[PretrainedFeatures, list[str]], np.ndarray]


@contextmanager
def on_dask(n_workers: int) -> Iterator[Transform]:
    """Start a Dask cluster; yield a function that transforms there."""
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield {
            # With one worker, joblib would compute in this process.
            1: lambda features, X: client.submit(
                features.transform, X, pure=False
            ).result(),
            2: lambda features, X: by_joblib("dask", features, X),
        }[n_workers]


@contextmanager
def on_ray(n_workers: int) -> Iterator[Transform]:
    """Start a Ray cluster; yield a function that transforms there."""
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=n_workers, include_dashboard=False, log_to_driver=False)
    register_ray()
    yield {
        1: lambda features, X: ray.get(
            ray.remote(type(features).transform).remote(features, X)
        ),
        2: lambda features, X: by_joblib("ray", features, X),
    }[n_workers]
    ray.shutdown()


def by_joblib(backend: str, features: PretrainedFeatures, X: list[str]) -> np.ndarray:
    """Distribute images over two workers."""
    with joblib.parallel_config(backend):
        return clone(features).set_params(n_jobs=2).transform(X)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description="Benchmark two workers against one")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--engines", nargs="+", default=["dask", "ray"])
    arguments = parser.parse_args()
    files = sorted(map(str, arguments.data.rglob("*.jpg")))
    paths = np.resize(files, arguments.images).tolist()
    features = PretrainedFeatures(
        arguments.backbone, weights=None, precision=arguments.precision
    )
    expected = features.transform(paths[:64])
    print(
        f"{arguments.backbone}, {arguments.precision}, {len(paths)} images, "
        f"{platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}"
    )
    for name in arguments.engines:
        rates, rates_beyond = [], []
        for n_workers in (1, 2):
            # As many processors as workers, so that the decoding thread of a single
            # worker does not use the second processor.
            os.sched_setaffinity(0, range(n_workers))
            with {"dask": on_dask, "ray": on_ray}[name](n_workers) as transform:
                transform(features, paths[:256])  # each worker loads the network
                start = time.perf_counter()
                transform(features, paths[:256])
                middle = time.perf_counter()
                rows = transform(features, paths)
                seconds = time.perf_counter() - middle
                rates.append(len(paths) / seconds)
                beyond = seconds - (middle - start)
                rates_beyond.append((len(paths) - 256) / beyond)
            assert np.array_equal(rows[:64], expected)
        one, two = rates
        print(
            f"{name}: one worker {one:.1f} images/s, two {two:.1f}: "
            f"{two / one:.2f} times as many; each image beyond the first 256, "
            f"{rates_beyond[1] / rates_beyond[0]:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
