"""Objects that are no sequences of images, and what to pass instead of them.

torch's classes are recognized without importing torch, and no element of a dataset is
read: that would decode an image.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NoReturn

import numpy as np
from PIL import Image

_PATH_OR_BYTES_TYPES = (str, bytes, os.PathLike)


def check_container(X: Any) -> Any:
    """Raise TypeError if X is no sequence of images, and say what to pass instead.

    Parameters
    ----------
    X : object
        Anything but an array, a data frame or a series.

    Returns
    -------
    object
        X, or a list of its elements, if X can be indexed and contains paths or bytes
        without being registered as a sequence.

    Raises
    ------
    TypeError
        If X is an open file, a dataset of torch, a mapping, a set or an iterator, or
        contains pairs of an image and a label.
    """
    name = type(X).__name__
    if _is_open_file(X):
        raise TypeError(
            f"X must be a sequence of images. Got an open file ({name}). Pass a list "
            f"of the contents of files, such as [{_content_of('X', X)}], or of paths."
        )
    if isinstance(X, Sequence):
        _check_no_pairs(X)
    elif _is_torch_data(X):
        _raise_for_dataset(X)
    elif isinstance(X, Mapping | Set | Iterator) or (
        isinstance(X, Iterable) and not hasattr(X, "__getitem__")
    ):
        raise TypeError(
            "X must be a sequence of images with an order and a length. Got "
            f"{name}. Pass a list, e.g. list(X) or list(X.values())."
        )
    elif hasattr(X, "__len__") and hasattr(X, "__getitem__"):
        return _list_indexable(X)
    return X


def _list_indexable(X: Any) -> Any:
    """Convert an object that is like a sequence to a list, if it contains files."""
    try:
        first = X[0]
    except Exception:
        # All exceptions on purpose: X may be any object, and scikit-learn raises a
        # better error.
        return X
    if isinstance(first, _PATH_OR_BYTES_TYPES):
        return [X[index] for index in range(len(X))]
    if isinstance(first, tuple | dict) or _is_image(first):
        # Not converted, since reading an element seems to decode an image.
        raise TypeError(
            "X must be a list, an array or another sequence of images. Got "
            f"{type(X).__name__} with elements of type {type(first).__name__}. Pass a "
            "list of paths, or of its images without their labels."
        )
    return X


def check_element(element: Any, index: int) -> None:
    """Raise TypeError if an element of X is an open file or a collection of images."""
    name = f"X[{index}]"
    if _is_open_file(element):
        raise TypeError(
            f"{name} is an open file ({type(element).__name__}), which cannot be read "
            f"more than once. Pass its content, {_content_of(name, element)}, or its "
            "path."
        )
    if _is_torch_data(element):
        raise TypeError(
            f"{name} is a {type(element).__name__}, not an image. Pass the images or "
            "their paths themselves as elements of X."
        )


def _is_open_file(value: object) -> bool:
    """Return whether a value is an open file, on disk or in memory."""
    return not hasattr(value, "__array__") and all(
        callable(getattr(value, name, None)) for name in ("read", "seek", "tell")
    )


def _content_of(name: str, file: object) -> str:
    return f"{name}.getvalue()" if hasattr(file, "getvalue") else f"{name}.read()"


def _is_torch_data(value: object) -> bool:
    """Return whether a value is a dataset or a data loader of torch."""
    data = sys.modules.get("torch.utils.data")  # not loaded: there are no instances
    return data is not None and isinstance(value, data.Dataset | data.DataLoader)


def _raise_for_dataset(X: Any) -> NoReturn:
    dataset, name = X, "X"
    if not hasattr(X, "__getitem__") and hasattr(X, "dataset"):
        dataset, name = X.dataset, "X.dataset"  # of a data loader
    inner = getattr(dataset, "dataset", None)
    if _has_samples(dataset):
        advice = f"[path for path, _ in {name}.samples], with {name}.targets as y"
    elif _has_samples(inner) and hasattr(dataset, "indices"):  # a subset
        advice = (
            f"[{name}.dataset.samples[i][0] for i in {name}.indices], and "
            f"[{name}.dataset.targets[i] for i in {name}.indices] as y"
        )
    elif hasattr(getattr(dataset, "data", None), "shape"):
        advice = f"the array {name}.data, with {name}.targets or {name}.labels as y"
    else:
        advice = (
            "a list of the paths of its files, or of its images without their labels, "
            f"such as [image for image, _ in {name}]"
        )
    raise TypeError(
        f"X must be a sequence of images. Got {type(X).__name__}, a dataset or data "
        f"loader of torch. Pass {advice}. Leave out its transforms: the estimator "
        "resizes and normalizes images itself."
    )


def _has_samples(dataset: object) -> bool:
    """Return whether a dataset lists its files, as those of torchvision's folders."""
    samples = getattr(dataset, "samples", None)
    return (
        isinstance(samples, list)
        and bool(samples)
        and isinstance(samples[0], tuple)
        and isinstance(samples[0][0], str | os.PathLike)
    )


def _check_no_pairs(X: Sequence[Any]) -> None:
    """Raise TypeError if the first element is a pair of an image and its label."""
    first = X[0] if len(X) else None
    if not isinstance(first, tuple) or len(first) < 2:
        return
    # A tuple of arrays only may be an image, row by row.
    is_image = [_is_image(value) for value in first]
    if any(is_image) and not (all(is_image) and hasattr(first[0], "ndim")):
        types = ", ".join(type(value).__name__ for value in first)
        raise TypeError(
            f"X must contain only images. Got X[0], a tuple of {types}. Pass images "
            "and labels apart, such as [image for image, _ in X] as X and "
            "[label for _, label in X] as y."
        )


def _is_image(value: object) -> bool:
    """Return whether a value is an image, in any form."""
    if isinstance(value, (*_PATH_OR_BYTES_TYPES, Image.Image)):
        return True
    return not isinstance(value, np.generic) and getattr(value, "ndim", 0) >= 2
