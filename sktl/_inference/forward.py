"""The forward loop: run images through a compiled model, batch by batch.

Images are decoded in threads, at most two batches ahead, while the model computes.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sktl._images.decode import row_name
from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import CompiledModel, Pixels, Rows
from sktl._inference.execution import ExecutionConfig
from sktl._inference.parallel import map_in_threads, n_decoding_threads


class ImageProvider(Protocol):
    """Sequence of images for `forward`, such as an `ImageSequence`."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, position: int) -> Image.Image | Callable[[], Pixels]:
        """Decode one image, in mode RGB; thread-safe.

        If a step that draws from global random generators remains, return a function
        that performs it and returns the pixels ``(side, side, 3)``, uint8. It is called
        in the thread of the forward loop.
        """

    def original_index(self, position: int) -> int | str:
        """Return the row of X or its name, for error messages."""


def forward(
    model: CompiledModel,
    images: ImageProvider,
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
) -> Rows:
    """Run all images through a model.

    A row does not depend on the other images: all batches have the same shape, see
    `ExecutionConfig.for_n_samples`.

    Parameters
    ----------
    model : CompiledModel
        From `get_compiled_model`.
    images : ImageProvider
        At least one image. Images are decoded when they are needed.
    preprocessing : Preprocessing
        Converts an image to pixels ``(side, side, 3)``, uint8.
    execution : ExecutionConfig
        Its `batch_size` is the number of images in every batch.

    Returns
    -------
    ndarray of shape (n_images, n_outputs), float32

    Raises
    ------
    ValueError
        If an image is invalid or its output is not finite; names the row.
    MemoryError
        If a batch does not fit into memory.
    """
    rows: Rows | None = None
    order = range(len(images))
    results = batches(model, images, order, preprocessing, execution)
    with contextlib.closing(results):
        for positions, out in results:
            if rows is None:
                rows = np.empty((len(images), out.shape[1]), dtype=np.float32)
            rows[positions] = out
    assert rows is not None  # there is at least one image
    return rows


def batches(
    model: CompiledModel,
    images: ImageProvider,
    order: Sequence[int],
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
    skip: Callable[[int], bool] = lambda position: False,
) -> Generator[tuple[list[int], Rows], None, None]:
    """Run images through a model, batch by batch.

    Parameters
    ----------
    model, images, preprocessing, execution
        As in `forward`.
    order : sequence of int
        Positions of the images to run, in order.
    skip : callable
        Called with a position immediately before its image is added to a batch; return
        True to leave the image out.

    Yields
    ------
    positions : list of int
        Positions of the images of one batch.
    out : ndarray of shape (len(positions), n_outputs), float32
        Their outputs.

    Raises
    ------
    ValueError, MemoryError
        As `forward`.
    """
    side, batch_size = preprocessing.crop_size, execution.batch_size
    # The last batch is padded with images of the previous one.
    batch = np.zeros((batch_size, side, side, 3), dtype=np.uint8)
    bar: Any = contextlib.nullcontext()
    if execution.verbose:  # otherwise not created: each bar starts a monitor thread
        bar = tqdm(total=len(order), unit="image", delay=1)
    n_threads = n_decoding_threads(execution.n_jobs)
    started: deque[tuple[list[int], Callable[[], Rows]]] = deque()

    def load(position: int) -> tuple[int, Pixels | Callable[[], Pixels]]:
        image = images[position]
        return position, image if callable(image) else preprocessing(image)

    def finish_oldest() -> tuple[list[int], Rows]:
        positions, wait = started.popleft()
        out = wait()[: len(positions)]
        _check_finite(out, positions, images, execution.precision)
        if execution.verbose:
            bar.update(len(positions))
        return positions, out

    decoded = map_in_threads(
        load, order, n_threads=n_threads, n_ahead=2 * max(batch_size, n_threads)
    )
    selected = ((i, pixels) for i, pixels in decoded if not skip(i))
    with contextlib.closing(decoded), bar:
        while chunk := list(itertools.islice(selected, batch_size)):
            for i, (_, pixels) in enumerate(chunk):
                batch[i] = pixels() if callable(pixels) else pixels
            positions = [position for position, _ in chunk]
            started.append((positions, model.start(batch)))
            if len(started) > model.n_ahead:
                yield finish_oldest()
        while started:
            yield finish_oldest()


def _check_finite(
    out: Rows, positions: Sequence[int], images: ImageProvider, precision: str
) -> None:
    finite = np.isfinite(out).all(axis=1)
    if not finite.all():
        advice = "The weights do not fit this network or this layer."
        if precision == "float16":
            advice = "Values above 65504 overflow in float16: use 'bfloat16'."
        row = row_name(images.original_index(positions[int(finite.argmin())]))
        raise ValueError(
            f"The output of the network for {row} must be finite. Got NaN or "
            f"infinity with precision={precision!r}. {advice}"
        )
