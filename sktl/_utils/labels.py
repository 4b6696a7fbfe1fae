"""Validation of class labels, missing values, and labels as JSON."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from sktl._utils.json_values import from_json, to_json
from sktl._utils.sklearn_compat import check_y

# Of bool, int, float, str and object, as NumPy writes them.
_LABEL_DTYPE = re.compile(r"[<>|=]([biuf][1248]|f16|U\d{1,4}|O)", re.ASCII)


def check_labels(y: Any, estimator: BaseEstimator, name: str = "y") -> NDArray[Any]:
    """Validate the class labels of images.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
        Labels: str, int or bool.
    estimator : BaseEstimator
        Named in errors.
    name : str, default="y"
        Name of `y` in errors.

    Returns
    -------
    ndarray of shape (n_samples,)

    Raises
    ------
    ValueError
        If a label is missing or infinite, or `y` is not a classification target.
    """
    for index, label in enumerate(_elements(y)):
        if is_missing(label):
            raise ValueError(
                f"{name}[{index}] is missing ({label!r}). Each image must have a "
                "label. Remove it and its image, or label it."
            )
        if isinstance(label, float | np.floating) and np.isinf(label):
            raise ValueError(
                f"Input {name} contains infinity or a value too large for a label: "
                f"{name}[{index}] is {label!r}. Remove it and its image, or label it."
            )
    labels: NDArray[Any] = check_y(y, estimator=estimator)
    if type_of_target(labels).startswith("continuous"):
        raise ValueError(
            f"Unknown label type: continuous. {type(estimator).__name__} requires "
            "class labels as y. To predict numbers, use FineTunedCNNRegressor; to "
            "predict classes, convert y to str or int."
        )
    check_classification_targets(labels)
    return labels


def is_missing(value: object) -> bool:
    """Return whether a value is None, NaN, or pandas' NA or NaT."""
    return (
        value is None
        or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def labels_to_json(labels: NDArray[Any]) -> dict[str, Any]:
    """Return class labels as values that JSON can hold.

    Raises
    ------
    TypeError
        If they are not str, int, float or bool.
    """
    return {"classes": to_json(labels.tolist()), "dtype": labels.dtype.str}


def labels_from_json(document: Mapping[str, Any]) -> NDArray[Any]:
    """Return the class labels that `labels_to_json` converted.

    Parameters
    ----------
    document : mapping of str
        From a file; anything that JSON can hold may be in it.

    Returns
    -------
    ndarray of shape (n_classes,)

    Raises
    ------
    ValueError
        If it does not have at least two different labels and their dtype.
    """
    classes, dtype = document.get("classes"), document.get("dtype")
    if not isinstance(classes, list):
        raise ValueError("its classes must be a list")
    if not isinstance(dtype, str) or not _LABEL_DTYPE.fullmatch(dtype):
        raise ValueError("its classes must have a valid dtype of labels")
    labels = list(from_json(classes))
    if not all(isinstance(label, bool | int | float | str) for label in labels):
        raise ValueError("its classes must be str, int, float or bool")
    try:
        decoded = np.array(labels, np.dtype(dtype))
    except (OverflowError, TypeError) as error:
        raise ValueError(f"its classes must have a valid dtype: {error}") from error
    if decoded.tolist() != labels or len(np.unique(decoded)) < max(2, len(labels)):
        raise ValueError("its classes must be at least two different labels")
    return decoded


def _elements(y: Any) -> Iterable[Any]:
    """Return the elements of `y` that may be missing; none if it is not a column."""
    if isinstance(y, str | bytes):
        return ()
    if isinstance(y, Sequence):
        # Not as an array, in which NaN beside strings is the string "nan".
        return y
    if not hasattr(y, "__array__"):
        return ()
    values = np.asarray(y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]  # (n_samples, 1) -> (n_samples,)
    # Floats and objects, and strings of variable length, which have a missing value.
    has_missing = values.ndim == 1 and values.dtype.kind in "fOT"
    elements: list[Any] = values.tolist() if has_missing else []
    return elements
