"""One namespace of a feature store: the rows of one model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import joblib
import numpy as np
from numpy.typing import NDArray

from sktl._store.feature_store import FeatureStore

Memory: TypeAlias = str | os.PathLike[str] | FeatureStore | joblib.Memory | None


def open_store(memory: Memory) -> FeatureStore | None:
    """Return the feature store of a parameter ``memory``.

    Parameters
    ----------
    memory : str, path-like, FeatureStore, joblib.Memory or None
        A directory, or an object that has one.

    Returns
    -------
    FeatureStore or None
        None if nothing is to be cached.
    """
    if memory is None or isinstance(memory, FeatureStore):
        return memory
    directory = memory.location if isinstance(memory, joblib.Memory) else memory
    return None if directory is None else FeatureStore(directory)


@dataclass(frozen=True)
class FeatureCache:
    """Cached rows of one model: a store and a namespace.

    Attributes
    ----------
    store : FeatureStore
        Holds the rows.
    namespace : mapping of str to str
        Every setting that affects a row, besides the image, by name.
    read_only : bool
        Whether `put` does nothing.
    """

    store: FeatureStore
    namespace: Mapping[str, str]
    read_only: bool = False

    def get(
        self, hashes: Sequence[bytes]
    ) -> tuple[NDArray[np.intp], NDArray[Any] | None]:
        """Read cached rows; see `FeatureStore.get`."""
        return self.store.get(self.namespace, hashes)

    def put(self, hashes: Sequence[bytes], rows: NDArray[Any]) -> None:
        """Write rows, unless read-only; see `FeatureStore.put`."""
        if not self.read_only:
            self.store.put(self.namespace, hashes, rows)

    def with_settings(self, settings: Mapping[str, str]) -> "FeatureCache":
        """Return the cache of the same rows with some other settings."""
        return replace(self, namespace={**self.namespace, **settings})

    def refresh(self) -> Mapping[bytes, object]:
        """Read which rows other processes wrote; return a mapping by image hash."""
        return self.store.known(self.namespace)

    def portable(self) -> "FeatureCache":
        """Return the same cache for a process with another working directory."""
        directory = os.path.abspath(os.path.expanduser(self.store.directory))
        store = FeatureStore(directory, self.store.max_bytes)
        return replace(self, store=store)


def open_cache(
    memory: Memory,
    model: Mapping[str, str],
    images: Mapping[str, str],
    *,
    read_only: bool = False,
) -> FeatureCache | None:
    """Return the cache of the rows of a model for some images.

    Parameters
    ----------
    memory : str, path-like, FeatureStore, joblib.Memory or None
        Location of the cache.
    model : mapping of str to str
        Every setting of the model that affects a row, see `ModelSpec.namespace`.
    images : mapping of str to str
        Every setting of the images that affects a row, besides their content, see
        `ImageSequence.decode_fingerprint`.
    read_only : bool, default=False
        Whether rows are read, but not written.

    Returns
    -------
    FeatureCache or None
        None if nothing is to be cached.
    """
    store = open_store(memory)
    if store is None:
        return None
    return FeatureCache(store, {**model, **images}, read_only)
