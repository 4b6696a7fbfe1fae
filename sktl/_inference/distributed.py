"""Distributed forward pass on the workers of a joblib backend.

sktl starts no workers. The user chooses a process-based joblib backend, for example by
``joblib.parallel_config("dask")``, and any `n_jobs` other than None distributes chunks
of images over its workers. A worker loads the network once, decodes its own images,
uses the same cache, if any, and returns rows only. The backend repeats the chunks of
a lost worker.
"""

import contextlib
from dataclasses import replace
from typing import Any

import joblib
import numpy as np
from joblib.parallel import get_active_backend
from tqdm.auto import tqdm

from sktl._inference.cached_forward import CacheableImages, cached_forward
from sktl._inference.engines import Rows
from sktl._inference.feature_cache import FeatureCache
from sktl._inference.model_spec import ModelSpec
from sktl._inference.parallel import uses_process_backend

# Size of a chunk: whole batches, of which few are lost with a worker or left for one
# worker at the end, but enough images to be worth a task.
_BATCHES_PER_CHUNK = 2
_MIN_IMAGES_PER_CHUNK = 8


def is_distributed(n_jobs: int | None) -> bool:
    """Return whether the images are distributed over workers of a joblib backend."""
    return n_jobs is not None and uses_process_backend()


def distributed_forward(
    spec: ModelSpec, images: CacheableImages, cache: FeatureCache | None
) -> Rows:
    """Run `cached_forward` on the workers of the active joblib backend, if any.

    The rows have the same bits as those computed in this process.

    Parameters
    ----------
    spec : ModelSpec
        Model to run. If the `n_jobs` of its execution is None, or the backend is not
        process-based, everything is computed in this process.
    images, cache
        As in `cached_forward`.

    Returns
    -------
    ndarray of shape (n_images, n_outputs), float32

    Raises
    ------
    ValueError, MemoryError
        As `cached_forward`, in any process.
    FileNotFoundError
        If the weights file is missing on the machine of a worker.
    """
    execution, preprocessing = spec.execution, spec.preprocessing
    if not is_distributed(execution.n_jobs):
        return cached_forward(spec.compile, images, preprocessing, execution, cache)
    on_worker = replace(execution, n_jobs=None, verbose=0)
    portable = None if cache is None else cache.portable()
    compute = joblib.delayed(cached_forward)
    chunks = _chunks(len(images), execution.batch_size)
    backend, _ = get_active_backend()
    as_generator = backend.supports_return_generator
    results = joblib.Parallel(
        n_jobs=execution.n_jobs, return_as="generator" if as_generator else "list"
    )(
        compute(
            spec.compile,
            images.subset(chunk).portable(),
            preprocessing,
            on_worker,
            portable,
        )
        for chunk in chunks
    )
    bar: Any = contextlib.nullcontext()
    if execution.verbose:
        bar = tqdm(total=len(images), unit="image", delay=1)
    closing: Any = contextlib.nullcontext()
    if as_generator:  # after an error or Ctrl-C, closing it cancels remaining chunks
        closing = contextlib.closing(results)
    rows: Rows | None = None
    with bar, closing:
        for chunk, out in zip(chunks, results, strict=True):
            if rows is None:
                rows = np.empty((len(images), out.shape[1]), dtype=np.float32)
            rows[chunk.start : chunk.stop] = out
            if execution.verbose:
                bar.update(len(chunk))
    assert rows is not None  # there is at least one image
    return rows


def _chunks(n_images: int, batch_size: int) -> list[range]:
    """Split positions into chunks of whole batches."""
    n_batches = max(_BATCHES_PER_CHUNK, -(-_MIN_IMAGES_PER_CHUNK // batch_size))
    size = n_batches * batch_size
    return [
        range(start, min(start + size, n_images)) for start in range(0, n_images, size)
    ]
