"""Cached forward pass: only images without a cached row go through the model."""

import contextlib
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
from PIL import Image

from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import CompiledModel, Pixels, Rows
from sktl._inference.execution import ExecutionConfig
from sktl._inference.feature_cache import FeatureCache
from sktl._inference.forward import ImageProvider, batches, forward

_MIN_ROWS_PER_WRITE = 32  # writing smaller files is inefficient


class CacheableImages(ImageProvider, Protocol):
    """Images with content hashes: `ImageSequence`, or `AugmentedViews` of one."""

    def content_hashes(self) -> list[bytes]:
        """Return a hash of each image; see `ImageSequence.content_hashes`."""

    def decode_and_hash(
        self, row: int, /
    ) -> tuple[bytes, Image.Image | Callable[[], Pixels]]:
        """Decode an image, and return the hash of the content that was decoded."""

    def decode_fingerprint(self) -> dict[str, str]:
        """Return the settings that affect the pixels of a decoded image."""

    def subset(self, positions: Sequence[int], /) -> Self:
        """Return some of the images."""

    def portable(self) -> Self:
        """Return the same images for a process with another working directory."""


def cached_forward(
    get_model: Callable[[], CompiledModel],
    images: CacheableImages,
    preprocessing: Preprocessing,
    execution: ExecutionConfig,
    cache: FeatureCache | None,
) -> Rows:
    """Return the output of a model for all images, computing only missing rows.

    Rows are written while they are computed, and rows that other processes have written
    meanwhile are looked up before each batch. The order of computation is random, so
    that workers that start together soon compute different images; the result does not
    depend on it.

    Parameters
    ----------
    get_model : callable
        Returns the compiled model. Not called if all rows are cached. Its engine is
        that of `execution`, or torch, see `ExecutionConfig.for_network`.
    images : CacheableImages
        At least one image.
    preprocessing, execution
        As in `forward`.
    cache : FeatureCache or None
        From `open_cache`. None computes all rows.

    Returns
    -------
    ndarray of shape (n_images, n_outputs), float32

    Raises
    ------
    ValueError
        As `forward`, or if the directory of the cache is a file.
    MemoryError
        As `forward`.
    """
    if cache is None:
        return forward(get_model(), images, preprocessing, execution)
    hashes = images.content_hashes()
    positions, cached = cache.get(hashes)
    if cached is not None and len(positions) == len(hashes):
        return cached
    rows = RowsByHash(hashes)
    rows.read(cache)
    eager_cache = cache.with_settings(execution.eager().cache_namespace())
    if execution.prefers_eager:  # for a small number of images
        rows.read(eager_cache)
    # Rows that other processes wrote meanwhile are read in the end. If they have been
    # deleted by then, the second pass computes them.
    for recompute_all in (False, True):
        if rows.missing:
            model = get_model()
            if model.execution.engine != execution.engine:
                cache = eager_cache
            missing = _MissingImages(images, rows, cache)
            missing.compute(
                model, preprocessing, execution, recompute_all=recompute_all
            )
            rows.read(cache)
    return rows.values()


class RowsByHash:
    """Rows of a call, filled in by image hash; equal images share a hash.

    Attributes
    ----------
    hashes : sequence of bytes
        Hash of each image of the call.
    missing : dict of bytes to list of int
        Positions of each hash whose row is missing.
    """

    def __init__(self, hashes: Sequence[bytes]) -> None:
        self.hashes = hashes
        self.missing: dict[bytes, list[int]] = {}
        for position, image_hash in enumerate(hashes):
            self.missing.setdefault(image_hash, []).append(position)
        self._values: Rows | None = None

    def read(self, cache: FeatureCache) -> None:
        """Read the missing rows that are cached."""
        hashes = list(self.missing)
        if hashes:
            positions, rows = cache.get(hashes)
            if rows is not None:
                self.fill([hashes[position] for position in positions], rows)

    def fill(self, hashes: Sequence[bytes], rows: Rows) -> None:
        """Copy rows to all positions of their hashes, which were missing."""
        if self._values is None:
            self._values = np.empty((len(self.hashes), rows.shape[1]), np.float32)
        positions = [self.missing.pop(image_hash) for image_hash in hashes]
        source = np.repeat(np.arange(len(rows)), [len(each) for each in positions])
        self._values[list(itertools.chain(*positions))] = rows[source]

    def values(self) -> Rows:
        """Return all rows."""
        assert self._values is not None  # there is at least one image
        return self._values


class _MissingImages:
    """Images whose rows are missing, each distinct one once.

    A file may change after its hash was computed. Its row is computed from the new
    content, and cached under the hash of the new content.

    Parameters
    ----------
    images : CacheableImages
        All images of the call.
    rows : RowsByHash
        Rows of the call; filled in by `compute`.
    cache : FeatureCache
        Computed rows are written to it.
    """

    def __init__(
        self, images: CacheableImages, rows: RowsByHash, cache: FeatureCache
    ) -> None:
        self._images = images
        self._cache = cache
        self._decoded_hashes: dict[int, bytes] = {}
        self.rows = rows

    def __len__(self) -> int:
        return len(self._images)

    def original_index(self, position: int) -> int | str:
        return self._images.original_index(position)

    def __getitem__(self, position: int) -> Image.Image | Callable[[], Pixels]:
        decoded_hash, image = self._images.decode_and_hash(position)
        self._decoded_hashes[position] = decoded_hash
        return image

    def compute(
        self,
        model: CompiledModel,
        preprocessing: Preprocessing,
        execution: ExecutionConfig,
        *,
        recompute_all: bool,
    ) -> None:
        """Compute and write the missing rows.

        Parameters
        ----------
        model, preprocessing, execution
            As in `forward`.
        recompute_all : bool
            Whether to compute also the rows that another process has written meanwhile.
        """
        hashes = self.rows.hashes
        order = [positions[0] for positions in self.rows.missing.values()]
        random.SystemRandom().shuffle(order)
        written: Mapping[bytes, object] = {}
        pending: list[tuple[bytes, Rows]] = []
        results = batches(
            model,
            self,
            order,
            preprocessing,
            execution,
            skip=lambda position: not recompute_all and hashes[position] in written,
        )
        try:
            with contextlib.closing(results):
                for positions, out in results:
                    self.rows.fill([hashes[position] for position in positions], out)
                    decoded = map(self._decoded_hashes.pop, positions)
                    pending += zip(decoded, out, strict=True)
                    if len(pending) >= _MIN_ROWS_PER_WRITE:
                        self._write(pending)
                        written = self._cache.refresh()
        finally:  # after an error or Ctrl-C, too, computed rows are written
            self._write(pending)

    def _write(self, pending: list[tuple[bytes, Rows]]) -> None:
        if pending:
            hashes, rows = zip(*pending, strict=True)
            self._cache.put(hashes, np.stack(rows))
            pending.clear()
