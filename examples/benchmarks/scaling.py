"""
=======================
Two workers against one
=======================

``transform`` of the same images by one worker process of a cluster on this machine,
and by two, each with one thread and one processor, on Dask and on Ray. That the network
is loaded is not in it; that Ray starts its workers anew for each call of joblib is.
What a call costs however few its images are is measured by one of 256, and told
apart.

::

    python examples/benchmarks/scaling.py --data FOLDER --backbone resnet18

``FOLDER`` holds JPEG files, at any depth. They are repeated until they are as many as
asked for; nothing is remembered. Weights are random: they do not change the time.
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
    """Start a cluster of Dask; give what transforms there."""
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield {
            # With one worker joblib would keep the work in this process.
            1: lambda mine, X: client.submit(mine.transform, X, pure=False).result(),
            2: lambda mine, X: by_joblib("dask", mine, X),
        }[n_workers]


@contextmanager
def on_ray(n_workers: int) -> Iterator[Transform]:
    """Start a cluster of Ray; give what transforms there."""
    import ray
    from ray.util.joblib import register_ray

    ray.init(num_cpus=n_workers, include_dashboard=False, log_to_driver=False)
    register_ray()
    yield {
        1: lambda mine, X: ray.get(ray.remote(type(mine).transform).remote(mine, X)),
        2: lambda mine, X: by_joblib("ray", mine, X),
    }[n_workers]
    ray.shutdown()


def by_joblib(backend: str, features: PretrainedFeatures, X: list[str]) -> np.ndarray:
    """Spread images over two workers."""
    with joblib.parallel_config(backend):
        return clone(features).set_params(n_jobs=2).transform(X)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Two workers against one")
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
        rates, rates_of_more = [], []
        for n_workers in (1, 2):
            # What is started now has as many processors as workers: else a thread that
            # decodes for the only worker would run where the second is to be.
            os.sched_setaffinity(0, range(n_workers))
            with {"dask": on_dask, "ray": on_ray}[name](n_workers) as transform:
                transform(features, paths[:256])  # each worker loads the network
                start = time.perf_counter()
                transform(features, paths[:256])
                middle = time.perf_counter()
                rows = transform(features, paths)
                seconds = time.perf_counter() - middle
                rates.append(len(paths) / seconds)
                more = seconds - (middle - start)
                rates_of_more.append((len(paths) - 256) / more)
            assert np.array_equal(rows[:64], expected)
        one, two = rates
        print(
            f"{name}: one worker {one:.1f} images a second, two {two:.1f}: "
            f"{two / one:.2f} times as many; each image beyond the first 256, "
            f"{rates_of_more[1] / rates_of_more[0]:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
