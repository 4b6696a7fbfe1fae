"""On-disk cache of one row per image, shared by processes and machines.

A store is a directory of namespaces, one for each way of computing rows, and a
namespace is a folder of shards: safetensors files of up to some thousand rows that are
written once and never changed. Each row is stored with the key of its image and a
checksum.

The layout resembles the packs of git: immutable files, merged by any process that finds
many small ones. Events that affect a shard are listed in `sktl._store.shard_index`;
those that affect a store are:

==========================  ====================================================
event                       behaviour
==========================  ====================================================
writer killed               a shard is renamed into place when complete, or missing
disk full or read-only      one warning; existing rows are still read
directory deleted           created again when the next row is written
==========================  ====================================================
"""

import functools
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._store.shard import DTYPES, KEY_BYTES, is_store_file, list_shards
from sktl._store.shard_index import ShardIndex
from sktl._utils.files import write_atomically

Namespace = Mapping[str, str]

_VERSION = "sktl-store-1"  # version of the layout, and name of its folder
_NAMESPACE_FOLDER = re.compile("[0-9a-f]{64}")  # sha256 of the description
# Size limit of merged shards in a namespace of usual size: merging takes some 10 ms.
_MERGE_LIMIT_BYTES = 3 * 2**20
_to_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps creates one per call
_CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n"  # bford.info/cachedir


class FeatureStore:
    """On-disk cache of the output of networks, one row per image.

    Pass a store, or just its directory, as ``memory`` of an estimator: each image is
    then computed once and read from the cache afterwards, across folds, candidates of a
    search, processes and sessions. One directory can be shared by many networks and by
    several machines.

    Parameters
    ----------
    directory : str or path-like
        Directory of the store. It is created when the first row is written. ``~`` is
        expanded to the home directory.
    max_bytes : int or None, default=None
        Maximum size of the rows on disk; if exceeded, the oldest rows are evicted. None
        sets no limit.

    Raises
    ------
    TypeError
        If `directory` is neither a str nor a path.
    ValueError
        If `directory` is empty or `max_bytes` is not a positive integer.

    See Also
    --------
    PretrainedFeatures : Extracts features; its parameter ``memory`` takes a store.

    Notes
    -----
    The cache key combines a hash of the image with every setting that affects the
    output: weights, layer, pooling, preprocessing, precision, kind of device, and the
    major versions of the libraries that decode and compute. A store therefore stays
    valid when images are moved or replaced, or libraries are updated. It cannot detect
    a change in the code of a registered network: if its ``forward`` changes and its
    layers do not, call `clear`.

    Wrong rows are never returned: each row has a checksum, and missing or damaged rows
    are computed again, with a warning if a file is damaged or cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import FeatureStore, PretrainedFeatures
    >>> images = load_sample_images().images
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     store = FeatureStore(directory)
    ...     features = PretrainedFeatures("resnet_mini", memory=store)
    ...     rows = features.fit_transform(images)
    ...     store.info()["rows"]
    2
    """

    def __init__(
        self, directory: str | os.PathLike[str], max_bytes: int | None = None
    ) -> None:
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(
                f"directory must be a str or a path. Got {directory!r} of type "
                f"{type(directory).__name__}."
            )
        if not os.fspath(directory) or "\0" in os.fspath(directory):
            raise ValueError(
                f"directory must be the name of a directory. Got {directory!r}. Use "
                "'.' for the current directory."
            )
        if max_bytes is not None and (
            not isinstance(max_bytes, Integral) or max_bytes is True or max_bytes <= 0
        ):
            raise ValueError(
                "max_bytes must be a positive integer, such as 10**9, or None for no "
                f"limit. Got {max_bytes!r}."
            )
        self.directory = directory
        self.max_bytes = max_bytes

    def __repr__(self) -> str:
        """Return the class, the directory and the size limit."""
        limit = "" if self.max_bytes is None else f", max_bytes={self.max_bytes}"
        return f"{type(self).__name__}({os.fspath(self.directory)!r}{limit})"

    def get(
        self, space: Namespace, keys: Sequence[bytes]
    ) -> tuple[NDArray[np.intp], NDArray[Any] | None]:
        """Read the rows that are in the store.

        Parameters
        ----------
        space : mapping of str to str
            Namespace: every setting that affects a row besides the image, by name.
        keys : sequence of bytes
            32 bytes for each image, such as the sha256 of its content.

        Returns
        -------
        positions : ndarray of shape (n_found,)
            Positions in `keys` of the rows that were found, in ascending order.
        rows : ndarray of shape (n_found, ...), or None
            Rows at these positions; None if no row was found.

        Raises
        ------
        ValueError
            If the directory of the store is a file.
        """
        return self._index(space).get(keys)

    def known(self, space: Namespace) -> Mapping[bytes, object]:
        """Return the keys that are in the store, including those of other processes.

        Parameters
        ----------
        space : mapping of str to str
            Namespace, as in `get`.

        Returns
        -------
        mapping
            Its keys are the keys of the rows. It must not be modified.

        Raises
        ------
        ValueError
            If the directory of the store is a file.
        """
        index = self._index(space)
        index.refresh()
        return index.row_ids

    def put(self, space: Namespace, keys: Sequence[bytes], rows: NDArray[Any]) -> None:
        """Write rows to the store; rows that it already has are not changed.

        Errors of the disk do not raise: rows that cannot be written are not cached,
        with one warning.

        Parameters
        ----------
        space : mapping of str to str
            Namespace, as in `get`.
        keys : sequence of bytes
            32 bytes for each row.
        rows : ndarray of shape (len(keys), ...)
            Rows of dtype float16, float32 or float64; all values must be finite.

        Raises
        ------
        ValueError
            If `keys` or `rows` are invalid, if the rows differ in shape or dtype from
            those in the namespace, or if the directory of the store is a file.
        """
        index = self._index(space)
        rows = np.asarray(rows)
        _check_rows(keys, rows)
        index.refresh()
        if index.row_ids and (rows.shape[1:], rows.dtype) != (
            index.row_shape,
            index.dtype,
        ):
            raise ValueError(
                "All rows of a namespace must have the same shape and dtype. Got shape "
                f"{rows.shape[1:]} and {rows.dtype}, expected {index.row_shape} and "
                f"{index.dtype}. Add the setting that differs to `space`."
            )
        new = {key: i for i, key in enumerate(keys) if key not in index.row_ids}
        if not new:
            return
        try:
            self._create_folder(index, space)
            index.write(list(new), rows[list(new.values())], time.time_ns())
            index.merge(self._merge_limit())
            self._evict()
        except OSError as error:
            _warn_once(
                self._root(),
                f"The feature store {str(self.directory)!r} cannot be written: "
                f"{error}. Results are correct, but not cached. Free disk space, or "
                "set memory to a writable directory.",
            )
        else:
            _warned_roots.discard(self._root())

    def info(self) -> dict[str, Any]:
        """Return the number of rows and bytes in the store.

        Returns
        -------
        dict
            ``"rows"`` and ``"bytes"`` of the whole store, and ``"spaces"``: for each
            namespace, by a readable name, a dict with ``"rows"``, ``"bytes"`` and
            ``"space"``, the settings that define it.

        Raises
        ------
        ValueError
            If the directory of the store is a file.
        """
        namespaces: dict[str, dict[str, Any]] = {}
        for folder in self._namespace_folders():
            index = _get_index(folder)
            index.refresh()
            if not index.row_ids:  # cleared, or all rows evicted
                continue
            description = _read_description(index.folder)
            name = ", ".join(v if len(v) <= 32 else v[:8] for v in description.values())
            namespaces[f"{name} [{index.folder.name[:8]}]"] = {
                "rows": len(index.row_ids),
                "bytes": sum(s.st_size for s in list_shards(index.folder).values()),
                "space": description,
            }
        total = {
            unit: sum(namespace[unit] for namespace in namespaces.values())
            for unit in ("rows", "bytes")
        }
        return {**total, "spaces": namespaces}

    def verify(self) -> dict[str, int]:
        """Read every row and verify its checksum.

        Returns
        -------
        dict
            ``"rows"``: number of intact rows. ``"corrupt"``: number of shards that are
            damaged, and were renamed to ``.corrupt``, or cannot be read.

        Raises
        ------
        ValueError
            If the directory of the store is a file.
        """
        intact = corrupt = 0
        for folder in self._namespace_folders():
            index = ShardIndex(Path(folder))  # a new one, which has cached nothing
            index.refresh()
            intact += sum(map(index.count_intact_rows, list(index.shards.values())))
            corrupt += len(index.rejected)
        return {"rows": intact, "corrupt": corrupt}

    def clear(self) -> None:
        """Delete all rows, and no other files.

        Raises
        ------
        OSError
            If a file cannot be deleted.
        ValueError
            If the directory of the store is a file.
        """
        for folder in self._namespace_folders():
            index = _get_index(folder)
            for file in index.folder.iterdir():
                if is_store_file(file.name):
                    file.unlink(missing_ok=True)
            index.force_refresh()

    def _root(self) -> str:
        # os.path is faster than pathlib, which matters in every call, and treats a name
        # that is too long as missing, where pathlib raises.
        directory = os.path.abspath(os.path.expanduser(self.directory))
        if os.path.isfile(directory):
            raise ValueError(
                "memory must be a directory, which may not exist yet. Got "
                f"{str(self.directory)!r}, which is a file. Choose another name."
            )
        return os.path.join(directory, _VERSION)

    def _index(self, space: Namespace) -> ShardIndex:
        name = _folder_name(*space, *space.values())
        return _get_index(os.path.join(self._root(), name))

    def _namespace_folders(self) -> list[str]:
        root = self._root()
        try:
            names = sorted(os.listdir(root))
        except FileNotFoundError:
            return []
        return [
            os.path.join(root, name)
            for name in names
            if _NAMESPACE_FOLDER.fullmatch(name)
        ]

    def _create_folder(self, index: ShardIndex, space: Namespace) -> None:
        description = index.folder / "space.json"
        if description.exists():
            return
        index.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(index.folder.parent / "CACHEDIR.TAG", _CACHE_TAG.encode())
        write_atomically(description, json.dumps(dict(space), indent=1).encode())

    def _merge_limit(self) -> int:
        # Much smaller than max_bytes, so that evicting the oldest shard does not empty
        # the store.
        return min(_MERGE_LIMIT_BYTES, (self.max_bytes or 8 * _MERGE_LIMIT_BYTES) // 8)

    def _evict(self) -> None:
        """Delete the oldest shards until the store is no larger than `max_bytes`."""
        if self.max_bytes is None:
            return
        shards = [
            (name, Path(folder), status.st_size)
            for folder in self._namespace_folders()
            for name, status in list_shards(Path(folder)).items()
        ]
        excess = sum(size for _, _, size in shards) - self.max_bytes
        for name, folder, size in sorted(shards):
            if excess <= 0:
                break
            (folder / name).unlink(missing_ok=True)
            excess -= size


# Index of each namespace folder, the most recently used last. An evicted one is created
# again when it is needed.
_indexes: OrderedDict[str, ShardIndex] = OrderedDict()
_MAX_INDEXES = 64
_indexes_lock = threading.Lock()
_warned_roots: set[str] = set()


# Cached, since it is called by every method. Typed: True equals 1, but not in JSON.
@functools.lru_cache(256, typed=True)
def _folder_name(*namespace: str) -> str:
    """Return the folder of a namespace, passed as all its names and then its values."""
    n = len(namespace) // 2
    description = _to_json(dict(zip(namespace[:n], namespace[n:], strict=True)))
    return hashlib.sha256(description.encode()).hexdigest()


def _get_index(folder: str) -> ShardIndex:
    with _indexes_lock:
        if folder not in _indexes:
            _indexes[folder] = ShardIndex(Path(folder))
            if len(_indexes) > _MAX_INDEXES:
                _indexes.popitem(last=False)
        _indexes.move_to_end(folder)
        return _indexes[folder]


def _warn_once(root: str, message: str) -> None:
    if root not in _warned_roots:
        _warned_roots.add(root)
        warnings.warn(message, UserWarning, stacklevel=3)


def _check_rows(keys: Sequence[bytes], rows: NDArray[Any]) -> None:
    """Raise ValueError if keys or rows are invalid."""
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(
                f"Each key must be {KEY_BYTES} bytes, such as a sha256. Got {key!r}."
            )
    if (
        rows.ndim < 2
        or len(keys) != len(rows)
        or 0 in rows.shape[1:]
        or rows.dtype.str not in DTYPES.values()
    ):
        raise ValueError(
            f"rows must be an array of floats with a row for each of {len(keys)} keys. "
            f"Got shape {rows.shape} and {rows.dtype}."
        )
    if not np.isfinite(rows).all():
        raise ValueError("rows must be finite. Got NaN or infinity.")


def _read_description(folder: Path) -> dict[str, str]:
    try:
        return {
            k: str(v)
            for k, v in json.loads((folder / "space.json").read_text()).items()
        }
    # Deeply nested JSON raises RecursionError; JSON other than an object,
    # AttributeError.
    except (OSError, ValueError, AttributeError, RecursionError):
        return {"unknown": "unknown"}
