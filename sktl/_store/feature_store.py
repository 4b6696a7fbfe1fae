"""Rows remembered per image, on disk, shared by processes and machines.

A store is a directory of *spaces*, one for each way of computing rows, and a space is a
directory of *shards*: safetensors files of up to some thousand rows that are written
once and never changed. Each row lies beside the key of its image and a checksum.

The layout follows what was learnt from git's packs: immutable files, merged by whoever
happens to have time. What may happen to a shard is in `sktl._store.shard_index`; to a
store:

==========================  ====================================================
what may happen             what then
==========================  ====================================================
killed while writing        a shard appears whole, by renaming, or not at all
disk full, read-only        one warning; what is there is still read
directory gone              made again when the next row is written
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

from sktl._store.shard import DTYPES, KEY_BYTES, is_ours, shards_in
from sktl._store.shard_index import ShardIndex
from sktl._utils.files import write_atomically

Space = Mapping[str, str]

_VERSION = "sktl-store-1"  # of the layout; another one is another directory
_SPACE = re.compile("[0-9a-f]{64}")  # the folder of one: sha256 of its description
# No shard of a space of usual size grows beyond it by merging: that takes some 10 ms.
_MERGED_BYTES = 3 * 2**20
_encode = json.JSONEncoder(sort_keys=True).encode  # json.dumps makes one each time
_CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n"  # bford.info/cachedir


class FeatureStore:
    """Remember on disk what a network computed of each image.

    Give it, or just its directory, to ``memory`` of an estimator: each image then
    goes through the network once, whatever folds, candidates, processes and sessions
    it turns up in. One directory may serve many networks and several machines.

    Parameters
    ----------
    directory : str or path-like
        Where the rows are kept. It is made when the first row is written. ``~`` is
        your home.
    max_bytes : int or None, default=None
        Size that the rows on disk may have; above it the oldest are deleted. None sets
        no limit.

    Raises
    ------
    TypeError
        If `directory` is neither a str nor a path.
    ValueError
        If `directory` is empty or `max_bytes` no positive integer.

    See Also
    --------
    PretrainedFeatures : Has a parameter ``memory`` that takes one.

    Notes
    -----
    A row is found by the content of its image, and by all else that decides it:
    weights, layer, pooling, preprocessing, precision, kind of device, and the major
    versions of what computes and decodes. So a store needs no care when images are
    moved or replaced or a library is updated. The one thing it cannot see is the code
    of a network that you registered: when its ``forward`` changes and its layers do
    not, `clear` it.

    Whatever happens on the disk, no wrong row is returned: each has a checksum, and
    what is damaged or gone is computed again, with a warning if something is amiss.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.datasets import load_sample_images
    >>> from sktl import FeatureStore, PretrainedFeatures
    >>> photographs = load_sample_images().images
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     store = FeatureStore(directory)
    ...     features = PretrainedFeatures("resnet_mini", memory=store)
    ...     rows = features.fit_transform(photographs)
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
                "'.' for the current one."
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
        """Show the directory."""
        limit = "" if self.max_bytes is None else f", max_bytes={self.max_bytes}"
        return f"{type(self).__name__}({os.fspath(self.directory)!r}{limit})"

    def get(
        self, space: Space, keys: Sequence[bytes]
    ) -> tuple[NDArray[np.intp], NDArray[Any] | None]:
        """Read the rows that are known.

        Parameters
        ----------
        space : mapping of str to str
            All that decides a row besides the image, by name.
        keys : sequence of bytes
            32 bytes for each image, such as a sha256 of its content.

        Returns
        -------
        positions : ndarray of shape (n_known,)
            Where in `keys` those stand whose rows are known, ascending.
        rows : ndarray of shape (n_known, ...), or None
            Their rows; None where none is known.

        Raises
        ------
        ValueError
            If the directory of the store is a file.
        """
        return self._index(space).get(keys)

    def known(self, space: Space) -> Mapping[bytes, object]:
        """Look up which rows there are now, those of other processes included.

        Parameters
        ----------
        space : mapping of str to str
            As in `get`.

        Returns
        -------
        mapping
            Its keys are those of the rows. Not to be changed.
        """
        index = self._index(space)
        index.refresh()
        return index.where

    def put(self, space: Space, keys: Sequence[bytes], rows: NDArray[Any]) -> None:
        """Remember rows; those that are known already stay as they are.

        It never fails because of the disk: what cannot be written is not remembered,
        with one warning.

        Parameters
        ----------
        space : mapping of str to str
            As in `get`.
        keys : sequence of bytes
            32 bytes for each row.
        rows : ndarray of shape (len(keys), ...)
            Of float16, float32 or float64, all values finite.

        Raises
        ------
        ValueError
            If the rows are not such an array, differ in shape from those of the space,
            or the directory of the store is a file.
        """
        index = self._index(space)
        rows = np.asarray(rows)
        _check_rows(keys, rows)
        index.refresh()
        if index.where and (rows.shape[1:], rows.dtype) != (
            index.row_shape,
            index.dtype,
        ):
            raise ValueError(
                f"All rows of a space must be alike. It has rows of shape "
                f"{index.row_shape} and {index.dtype}. Got {rows.shape[1:]} and "
                f"{rows.dtype}. Say in `space` what makes the difference."
            )
        new = {key: i for i, key in enumerate(keys) if key not in index.where}
        if not new:
            return
        try:
            self._make(index, space)
            index.write(list(new), rows[list(new.values())], time.time_ns())
            index.merge(self._merged_bytes())
            self._evict()
        except OSError as error:
            _warn_once(
                self._root(),
                f"The feature store {str(self.directory)!r} cannot be written: {error} "
                "Results are right, but not remembered. Free space, or choose a "
                "directory that can be written, for memory.",
            )
        else:
            _warned.discard(self._root())

    def info(self) -> dict[str, Any]:
        """Say what is in the store.

        Returns
        -------
        dict
            ``"rows"`` and ``"bytes"`` of the whole, and ``"spaces"``: by a readable
            name, a dict with ``"rows"``, ``"bytes"`` and ``"space"``, its description.
        """
        spaces: dict[str, dict[str, Any]] = {}
        for folder in self._folders():
            index = _index_of(folder)
            index.refresh()
            if not index.where:  # cleared, or all evicted
                continue
            description = _description(index.folder)
            name = ", ".join(v if len(v) <= 32 else v[:8] for v in description.values())
            spaces[f"{name} [{index.folder.name[:8]}]"] = {
                "rows": len(index.where),
                "bytes": sum(s.st_size for s in shards_in(index.folder).values()),
                "space": description,
            }
        total = {
            unit: sum(space[unit] for space in spaces.values())
            for unit in ("rows", "bytes")
        }
        return {**total, "spaces": spaces}

    def verify(self) -> dict[str, int]:
        """Read every row and compare its checksum.

        Returns
        -------
        dict
            ``"rows"`` that are as they were written, and ``"corrupt"``, the number of
            shards that were not and have been put aside.
        """
        intact = corrupt = 0
        for folder in self._folders():
            index = ShardIndex(Path(folder))  # that believes the disk only
            index.refresh()
            intact += sum(map(index.n_intact, list(index.shards.values())))
            corrupt += len(index.refused)
        return {"rows": intact, "corrupt": corrupt}

    def clear(self) -> None:
        """Delete every row, and nothing that is not the store's.

        Raises
        ------
        OSError
            If a file cannot be deleted.
        """
        for folder in self._folders():
            index = _index_of(folder)
            for file in index.folder.iterdir():
                if is_ours(file.name):
                    file.unlink(missing_ok=True)
            index.changed()

    def _root(self) -> str:  # by os.path, since it is asked for in each call
        directory = os.path.abspath(os.path.expanduser(self.directory))
        # os.path, since to pathlib a name too long is an error and not an absence.
        if os.path.isfile(directory):
            raise ValueError(
                f"memory must be a directory, or one that can be made. Got "
                f"{str(self.directory)!r}, which is a file. Choose another name."
            )
        return os.path.join(directory, _VERSION)

    def _index(self, space: Space) -> ShardIndex:
        name = _folder_name(*space, *space.values())
        return _index_of(os.path.join(self._root(), name))

    def _folders(self) -> list[str]:
        root = self._root()
        try:
            names = sorted(os.listdir(root))
        except FileNotFoundError:
            return []
        return [os.path.join(root, name) for name in names if _SPACE.fullmatch(name)]

    def _make(self, index: ShardIndex, space: Space) -> None:
        description = index.folder / "space.json"
        if description.exists():
            return
        index.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(index.folder.parent / "CACHEDIR.TAG", _CACHE_TAG.encode())
        write_atomically(description, json.dumps(dict(space), indent=1).encode())

    def _merged_bytes(self) -> int:
        # Small enough that deleting the oldest shard does not empty the store.
        return min(_MERGED_BYTES, (self.max_bytes or 8 * _MERGED_BYTES) // 8)

    def _evict(self) -> None:
        if self.max_bytes is None:
            return
        shards = [
            (name, Path(folder), status.st_size)
            for folder in self._folders()
            for name, status in shards_in(Path(folder)).items()
        ]
        excess = sum(size for _, _, size in shards) - self.max_bytes
        for name, folder, size in sorted(shards):
            if excess <= 0:
                break
            (folder / name).unlink(missing_ok=True)
            excess -= size


# By folder, the one used last at the end. One that is needed again is read again.
_indexes: OrderedDict[str, ShardIndex] = OrderedDict()
_MOST_INDEXES = 64
_indexes_lock = threading.Lock()
_warned: set[str] = set()


# Asked for in each call. Typed, since True is 1, but not as JSON.
@functools.lru_cache(256, typed=True)
def _folder_name(*space: str) -> str:
    """Name the folder of a space, given by its names and then their values."""
    n = len(space) // 2
    described = _encode(dict(zip(space[:n], space[n:], strict=True)))
    return hashlib.sha256(described.encode()).hexdigest()


def _index_of(folder: str) -> ShardIndex:
    with _indexes_lock:
        if folder not in _indexes:
            _indexes[folder] = ShardIndex(Path(folder))
            if len(_indexes) > _MOST_INDEXES:
                _indexes.popitem(last=False)
        _indexes.move_to_end(folder)
        return _indexes[folder]


def _warn_once(root: str, message: str) -> None:
    if root not in _warned:
        _warned.add(root)
        warnings.warn(message, UserWarning, stacklevel=3)


def _check_rows(keys: Sequence[bytes], rows: NDArray[Any]) -> None:
    if not all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in keys):
        raise ValueError(f"A key must be {KEY_BYTES} bytes, such as a sha256.")
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


def _description(folder: Path) -> dict[str, str]:
    try:
        return {
            k: str(v)
            for k, v in json.loads((folder / "space.json").read_text()).items()
        }
    # A RecursionError is what JSON of a thousand brackets makes.
    except (OSError, ValueError, AttributeError, RecursionError):
        return {"unknown": "unknown"}
