"""Where images go through the network: here, or spread over the workers of a cluster.

sktl builds no cluster. Whoever has one tells joblib (``joblib.parallel_config("dask")``
or ``"ray"``), and n_jobs other than None sends chunks of images there. A worker loads
the network once, decodes its own images, shares the store, if there is one, and
sends back rows only. Chunks of a lost worker are the engine's to do again.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import joblib
import numpy as np
from joblib.parallel import get_active_backend
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sktl._images.preprocessing import Preprocessing
from sktl._inference.cached_forward import (
    CacheableImages,
    Memory,
    cached_forward,
    open_store,
)
from sktl._inference.execution import Execution
from sktl._inference.forward import uses_process_backend
from sktl._inference.model_spec import ModelSpec
from sktl._store.feature_store import FeatureStore

_BATCHES = 2  # of a chunk: so many are lost with a worker, or waited for at the end


def is_distributed(n_jobs: int | None) -> bool:
    """Tell whether the user chose a backend of processes, and wants it to be used."""
    return n_jobs is not None and uses_process_backend()


def distributed_forward(
    network: ModelSpec,
    images: CacheableImages,
    preprocessing: Preprocessing,
    execution: Execution,
    *,
    memory: Memory,
    space: Mapping[str, str],
    batch_size: int,
    n_jobs: int | None,
    verbose: int,
    n_samples: int | None = None,
) -> NDArray[np.float32]:
    """Do what `cached_forward` does, with the workers of the backend that was chosen.

    The rows have the same bits, wherever they come from.

    Parameters
    ----------
    network : ModelSpec
        What computes.
    images, preprocessing, execution, memory, space, batch_size, verbose, n_samples
        As in `cached_forward`.
    n_jobs : int or None
        None keeps the work in this process, as does a backend of threads, and none.

    Returns
    -------
    ndarray of shape (n_samples, n_outputs), float32

    Raises
    ------
    ValueError, MemoryError
        As `cached_forward` does, whichever process it was in.
    FileNotFoundError
        If a worker does not have the weights; names it.
    """
    options: dict[str, Any] = {"space": space, "batch_size": batch_size}
    options["n_samples"] = n_samples or len(images)
    if not is_distributed(n_jobs):
        options |= {"memory": memory, "n_jobs": n_jobs, "verbose": verbose}
        return cached_forward(network, images, preprocessing, execution, **options)
    options |= {"memory": _elsewhere(open_store(memory)), "n_jobs": None, "verbose": 0}
    starts = range(0, len(images), _BATCHES * batch_size)
    chunks = [range(start, len(images))[: starts.step] for start in starts]
    compute = joblib.delayed(cached_forward)
    backend, _ = get_active_backend()
    as_they_come = backend.supports_return_generator
    results = joblib.Parallel(
        n_jobs=n_jobs, return_as="generator" if as_they_come else "list"
    )(
        compute(
            network,
            images.subset(chunk).portable(),
            preprocessing,
            execution,
            **options,
        )
        for chunk in chunks
    )
    bar: Any = contextlib.nullcontext()
    if verbose:
        bar = tqdm(total=len(images), unit="image", delay=1)
    ending: Any = contextlib.nullcontext()
    if as_they_come:  # on an error or Ctrl-C, what waits is given up
        ending = contextlib.closing(results)
    rows: NDArray[np.float32] | None = None
    with bar, ending:
        for chunk, out in zip(chunks, results, strict=True):
            if rows is None:
                rows = np.empty((len(images), out.shape[1]), dtype=np.float32)
            rows[chunk.start : chunk.stop] = out
            if verbose:
                bar.update(len(chunk))
    assert rows is not None  # there is at least one image
    return rows


def _elsewhere(store: FeatureStore | None) -> FeatureStore | None:
    """Give the same store, for a process with another working directory."""
    if store is None:
        return None
    directory = os.path.abspath(os.path.expanduser(store.directory))
    return FeatureStore(directory, store.max_bytes)
