"""Every image goes through the network once: forward, with a store beside it."""

import contextlib
import functools
import itertools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias

import joblib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import CompiledModel
from sktl._inference.execution import Execution
from sktl._inference.forward import ImageProvider, batches, forward, padded_batch_size
from sktl._store.feature_store import FeatureStore


class CacheableImages(ImageProvider, Protocol):
    """Images whose content has keys: `ImageSequence`, or `AugmentedViews` of them."""

    def content_hashes(self) -> list[bytes]:
        """Give the keys of all; see `ImageSequence.content_hashes`."""

    def decode_and_hash(
        self, row: int, /
    ) -> tuple[bytes, Image.Image | Callable[[], NDArray[np.uint8]]]:
        """Give an image with the key of just that content."""

    def decode_fingerprint(self) -> dict[str, str]:
        """Say what decides, beside its content, what an image looks like."""

    def subset(self, positions: Sequence[int], /) -> Self:
        """Give some of them."""

    def portable(self) -> Self:
        """Give the same, for a process with another working directory."""


Memory: TypeAlias = str | os.PathLike[str] | FeatureStore | joblib.Memory | None
_LEAST_WRITTEN = 32  # rows; a file of fewer is a waste
# Equal ones do the same; and to print one costs as much as to look up 50 rows.
_described = functools.lru_cache(32)(str)


def open_store(memory: Memory) -> FeatureStore | None:
    """Make a store of what users give as ``memory``.

    Parameters
    ----------
    memory : str, path-like, FeatureStore, joblib.Memory or None
        A directory, or what has one.

    Returns
    -------
    FeatureStore or None
        None if nothing is to be remembered.
    """
    if memory is None or isinstance(memory, FeatureStore):
        return memory
    directory = memory.location if isinstance(memory, joblib.Memory) else memory
    return None if directory is None else FeatureStore(directory)


def cached_forward(
    network: Callable[[], CompiledModel],
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
    """Do what `forward` does, for each image only once.

    Images are told apart by their content. Rows are written as they come, and before
    each batch it is looked up what other processes have written meanwhile. Each call
    has an order of its own, so that workers that begin together soon compute different
    images; rows do not depend on it.

    Parameters
    ----------
    network : callable
        Gives the network; not called if every row is known.
    images, preprocessing, batch_size, n_jobs, verbose, n_samples
        As in `forward`.
    execution : Execution
        How the network computes.
    memory : str, path-like, FeatureStore, joblib.Memory or None
        Where rows are remembered; None to compute all.
    space : mapping of str to str
        What the network computes; the rest of what decides a row is added here.

    Returns
    -------
    ndarray of shape (n_samples, n_outputs), float32

    Raises
    ------
    ValueError
        As `forward` does, or if the directory is a file.
    MemoryError
        As `forward` does.
    """
    options: dict[str, Any] = {"n_jobs": n_jobs, "verbose": verbose}
    n_samples = n_samples or len(images)
    store = open_store(memory)
    if store is None:
        options |= {"batch_size": batch_size, "n_samples": n_samples}
        return forward(network(), images, preprocessing, **options)
    # Padded or one by one is decided by the call, not by how much of it is known: so
    # the bits are those of a call without a store.
    options["batch_size"] = padded_batch_size(n_samples, batch_size)
    space = {
        **space,
        "preprocessing": _described(preprocessing),
        **images.decode_fingerprint(),
        **execution.space(),
    }
    keys = images.content_hashes()
    positions, known = store.get(space, keys)
    if known is not None and len(positions) == len(keys):
        return known
    rows = _Rows(keys)
    rows.read(store, space)
    for alone in (False, True):
        if rows.missing:
            missing = _MissingImages(images, rows, store, space)
            missing.compute(network(), preprocessing, alone=alone, **options)
            # What others computed meanwhile was left out. Should it be gone again,
            # the second time nothing is.
            rows.read(store, space)
    return rows.values()


class _Rows:
    """Rows by key, while they come in; the same image may stand in several places."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = keys
        self.missing: dict[bytes, list[int]] = {}
        for position, key in enumerate(keys):
            self.missing.setdefault(key, []).append(position)
        self._values: NDArray[np.float32] | None = None

    def read(self, store: FeatureStore, space: Mapping[str, str]) -> None:
        """Take from the store what it has of the missing ones."""
        keys = list(self.missing)
        if keys:
            positions, rows = store.get(space, keys)
            if rows is not None:
                self.take([keys[position] for position in positions], rows)

    def take(self, keys: Sequence[bytes], rows: NDArray[np.float32]) -> None:
        """Put rows where they belong."""
        if self._values is None:
            self._values = np.empty((len(self.keys), rows.shape[1]), dtype=np.float32)
        places = [self.missing.pop(key) for key in keys]
        source = np.repeat(np.arange(len(rows)), [len(place) for place in places])
        self._values[list(itertools.chain(*places))] = rows[source]

    def values(self) -> NDArray[np.float32]:
        assert self._values is not None  # there is at least one image
        return self._values


class _MissingImages:
    """The images whose rows are not known, each once, with the keys they have now.

    A file may change after its key was taken. Its row is what is in it now, and is
    remembered as that.
    """

    def __init__(
        self,
        images: CacheableImages,
        rows: _Rows,
        store: FeatureStore,
        space: Mapping[str, str],
    ) -> None:
        self._images = images
        self._rows = rows
        self._store = store
        self._space = space
        self._keys_now: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._images)

    def original_index(self, position: int) -> int:
        return self._images.original_index(position)

    def __getitem__(
        self, position: int
    ) -> Image.Image | Callable[[], NDArray[np.uint8]]:
        self._keys_now[position], image = self._images.decode_and_hash(position)
        return image

    def compute(
        self,
        network: CompiledModel,
        preprocessing: Preprocessing,
        *,
        alone: bool,
        **options: Any,
    ) -> None:
        """Compute rows and write them; if not `alone`, leave out what others wrote."""
        order = [positions[0] for positions in self._rows.missing.values()]
        random.SystemRandom().shuffle(order)
        keys = self._rows.keys
        known: Mapping[bytes, object] = {}
        to_write: list[tuple[bytes, NDArray[np.float32]]] = []
        results = batches(
            network,
            self,
            order,
            preprocessing,
            skip=lambda position: not alone and keys[position] in known,
            **options,
        )
        try:
            with contextlib.closing(results):
                for positions, out in results:
                    self._rows.take([keys[position] for position in positions], out)
                    now = [self._keys_now.pop(position) for position in positions]
                    to_write += zip(now, out, strict=True)
                    if len(to_write) >= _LEAST_WRITTEN:
                        self._write(to_write)
                        known = self._store.known(self._space)
        finally:  # what is computed is kept, whatever ended it
            self._write(to_write)

    def _write(self, rows: list[tuple[bytes, NDArray[np.float32]]]) -> None:
        if rows:
            keys = [key for key, _ in rows]
            self._store.put(self._space, keys, np.stack([row for _, row in rows]))
            rows.clear()
