"""Decoding threads, and the joblib backend chosen by the user."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import joblib
import torch
from joblib.parallel import get_active_backend
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Key = TypeVar("Key")


def uses_process_backend() -> bool:
    """Return whether the user chose a joblib backend whose workers are processes."""
    # The preference applies only where no backend was chosen.
    backend, _ = get_active_backend(prefer="threads")
    return not getattr(backend, "supports_sharedmem", False)


def n_decoding_threads(n_jobs: int | None) -> int:
    """Return the number of threads that decode images.

    Parameters
    ----------
    n_jobs : int or None
        As in joblib. None, outside of a :obj:`joblib.parallel_config` context, means
        the number of threads of torch: the number of processors, or what environment
        variables or joblib allow this process. With a process-based backend the result
        is that number for any `n_jobs`.

    Returns
    -------
    int
        At least 1.
    """
    n_threads = torch.get_num_threads()
    if uses_process_backend():
        return n_threads  # n_jobs is the number of workers
    n: int = joblib.effective_n_jobs(n_jobs)
    return max(n, n_threads) if n_jobs is None else n


@contextlib.contextmanager
def single_openmp_thread() -> Iterator[None]:
    """Run the operations of torch in this thread without starting OpenMP threads.

    A process that forks after OpenMP has started threads has children that wait for
    these threads, which they do not have. Other threads are not affected.
    """
    torch.get_num_threads()  # torch sets the number when a thread uses it first
    with threadpool_limits(1, "openmp"):
        yield


def map_in_threads(
    load: Callable[[Key], Item],
    keys: Sequence[Key],
    *,
    n_threads: int,
    n_ahead: int,
) -> Generator[Item, None, None]:
    """Load items in threads, in order, a limited number ahead.

    Threads are sufficient for images: Pillow releases the global interpreter lock while
    it decodes.

    Parameters
    ----------
    load : callable
        Returns the item of a key; called by several threads at once.
    keys : sequence
        Arguments of `load`.
    n_threads : int
        Number of threads.
    n_ahead : int
        Maximum number of items loaded before they are requested.

    Yields
    ------
    object
        The items, in the order of `keys`.
    """
    if len(keys) == 1:  # not worth a thread
        yield load(keys[0])
        return
    pool = ThreadPoolExecutor(n_threads)
    pending: deque[Future[Item]] = deque()
    try:
        for key in keys:
            pending.append(pool.submit(load, key))
            if len(pending) > n_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Also after an invalid image or Ctrl-C: cancel what has not started.
        pool.shutdown(cancel_futures=True)
