"""The one way through a network: the forward loop.

A row does not depend on its neighbours: see `forward`. And the network never waits for
the disk: images are decoded in threads, at most two batches ahead, while it computes.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import joblib
import numpy as np
import torch
from joblib.parallel import get_active_backend
from PIL import Image
from tqdm.auto import tqdm

from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import CompiledModel, Pixels, Rows

Item = TypeVar("Item")
Place = TypeVar("Place")


class ImageProvider(Protocol):
    """A sequence of images for `forward`, such as an `ImageSequence`."""

    def __len__(self) -> int:
        """Give the number of images."""

    def __getitem__(self, position: int) -> Image.Image | Callable[[], Pixels]:
        """Decode one, in mode RGB; several threads may ask at once.

        Where something is left to be done that draws from global random generators, a
        function that does it, and gives pixels ``(side, side, 3)``, uint8. It is called
        in the thread that goes through the network.
        """

    def original_index(self, position: int) -> int:
        """Say what errors call it."""


def forward(
    network: CompiledModel,
    images: ImageProvider,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    n_jobs: int | None = None,
    verbose: int = 0,
    n_samples: int | None = None,
) -> Rows:
    """Run every image through a network.

    A row does not depend on its neighbours. A library of convolutions chooses its
    algorithm by the shape of the batch, and another algorithm rounds differently; so
    the shape is not left to chance. From `batch_size` images on, every batch has
    `batch_size` images (the last is filled up, and what fills it is thrown away);
    below, every image goes through on its own, which is also the quickest for one.

    Parameters
    ----------
    network : CompiledModel
        From `get_compiled_model`.
    images : ImageProvider
        Decoded as they are needed.
    preprocessing : Preprocessing
        Turns an image into ``(side, side, 3)`` uint8.
    batch_size : int
        Number of images that go through at a time.
    n_jobs : int or None
        Threads that decode, see `n_decoding_threads`.
    verbose : int
        Above 0, a bar on whatever takes longer than a second.
    n_samples : int, default=None
        Number of images of which these are some, where they come in several calls:
        it decides the shape of the batches, and so the bits. None: these are all.

    Returns
    -------
    ndarray of shape (n_images, n_outputs), float32

    Raises
    ------
    ValueError
        If an image is bad, or its output is not finite; the row is named.
    MemoryError
        If a batch does not fit; it says what to change.
    """
    n_images = len(images)
    rows: Rows | None = None
    results = batches(
        network,
        images,
        range(n_images),
        preprocessing,
        batch_size=padded_batch_size(n_samples or n_images, batch_size),
        n_jobs=n_jobs,
        verbose=verbose,
    )
    with contextlib.closing(results):
        for positions, out in results:
            if rows is None:
                rows = np.empty((n_images, out.shape[1]), dtype=np.float32)
            rows[positions] = out
    assert rows is not None  # there is at least one image
    return rows


def padded_batch_size(n_samples: int, batch_size: int) -> int:
    """Say how many images go through at a time in a call with `n_samples`."""
    return batch_size if n_samples >= batch_size else 1


def batches(
    network: CompiledModel,
    images: ImageProvider,
    order: Sequence[int],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    n_jobs: int | None = None,
    verbose: int = 0,
    skip: Callable[[int], bool] = lambda position: False,
) -> Generator[tuple[list[int], Rows], None, None]:
    """Run images through a network, batch by batch; see `forward`.

    Parameters
    ----------
    network, images, preprocessing, n_jobs, verbose
        As in `forward`.
    order : sequence of int
        Which images, and in what order.
    batch_size : int
        Number of images that go through at a time, in any case.
    skip : callable
        Asked of a position immediately before its image goes through: True to leave
        it out.

    Yields
    ------
    positions : list of int
        Of the images of one batch; at most `batch_size`.
    out : ndarray of shape (len(positions), n_outputs), float32
        Their outputs.

    Raises
    ------
    ValueError, MemoryError
        As `forward` does.
    """
    side = preprocessing.crop_size
    # What fills up the last batch are images of the batch before.
    batch = np.zeros((batch_size, side, side, 3), dtype=np.uint8)
    bar: Any = contextlib.nullcontext()
    if verbose:  # else not even made: every bar has a thread that watches it
        bar = tqdm(total=len(order), unit="image", delay=1)
    n_threads = n_decoding_threads(n_jobs)
    ahead = 2 * max(batch_size, n_threads)
    started: deque[tuple[list[int], Callable[[], Rows]]] = deque()

    def load(position: int) -> tuple[int, Pixels | Callable[[], Pixels]]:
        image = images[position]
        return position, image if callable(image) else preprocessing(image)

    def oldest() -> tuple[list[int], Rows]:
        positions, wait = started.popleft()
        out = wait()[: len(positions)]
        _check_finite(out, positions, images, network.execution.precision)
        if verbose:
            bar.update(len(positions))
        return positions, out

    decoded = map_in_threads(load, order, n_threads=n_threads, ahead=ahead)
    wanted = ((i, pixels) for i, pixels in decoded if not skip(i))
    with contextlib.closing(decoded), bar:
        while chunk := list(itertools.islice(wanted, batch_size)):
            for i, (_, pixels) in enumerate(chunk):
                batch[i] = pixels() if callable(pixels) else pixels
            positions = [position for position, _ in chunk]
            started.append((positions, network.start(batch)))
            if len(started) > network.n_ahead:
                yield oldest()
        while started:
            yield oldest()


def n_decoding_threads(n_jobs: int | None) -> int:
    """Say how many threads decode.

    Parameters
    ----------
    n_jobs : int or None
        In joblib's counting; but None, outside of a :obj:`joblib.parallel_config`
        context, is as many as torch computes with. That is the number of processors,
        or what the environment or joblib leave to this process. With a backend of
        processes, such as Dask's, it is that in any case.

    Returns
    -------
    int
        At least 1.
    """
    n_threads = torch.get_num_threads()
    if uses_process_backend():
        return n_threads  # the number of jobs is for all of a cluster
    n: int = joblib.effective_n_jobs(n_jobs)
    return max(n, n_threads) if n_jobs is None else n


def uses_process_backend() -> bool:
    """Tell whether the user chose a backend of joblib whose workers are processes."""
    # Where nothing is chosen it prefers threads; a choice it leaves as it is.
    backend, _ = get_active_backend(prefer="threads")
    return not getattr(backend, "supports_sharedmem", False)


def map_in_threads(
    load: Callable[[Place], Item],
    order: Sequence[Place],
    *,
    n_threads: int,
    ahead: int,
) -> Generator[Item, None, None]:
    """Load what stands at some positions in threads, in order, a little ahead.

    Threads suffice for images, because Pillow lets go of the interpreter while it
    decodes.

    Parameters
    ----------
    load : callable
        Gives the item at a position; called by several threads at once.
    order : sequence
        The positions, or whatever `load` takes.
    n_threads : int
        How many threads.
    ahead : int
        How many items at most are loaded before they are asked for.

    Yields
    ------
    object
        What `load` gives, in that order.
    """
    if len(order) == 1:  # a thread would only cost
        yield load(order[0])
        return
    pool = ThreadPoolExecutor(n_threads)
    waiting: deque[Future[Item]] = deque()
    try:
        for i in order:
            waiting.append(pool.submit(load, i))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Reached on a bad image and on Ctrl-C too: what waits is given up.
        pool.shutdown(cancel_futures=True)


def _check_finite(
    out: Rows, positions: Sequence[int], images: ImageProvider, precision: str
) -> None:
    finite = np.isfinite(out).all(axis=1)
    if not finite.all():
        advice = "These weights do not fit this network or this layer."
        if precision == "float16":
            advice = "Numbers above 65504 overflow in float16: try 'bfloat16'."
        row = images.original_index(positions[int(finite.argmin())])
        raise ValueError(
            f"The output of the network for X[{row}] must be finite. Got NaN or "
            f"infinity with precision={precision!r}. {advice}"
        )
