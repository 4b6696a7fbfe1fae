"""Validation of class labels, and missing values."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets

from sktl._utils.sklearn_compat import check_y


def check_labels(y: Any, estimator: BaseEstimator) -> NDArray[Any]:
    """Validate the class labels of images.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
        Labels: str, int or bool.
    estimator : BaseEstimator
        Named in errors.

    Returns
    -------
    ndarray of shape (n_samples,)

    Raises
    ------
    ValueError
        If a label is missing, or `y` is not a classification target.
    """
    for index, label in enumerate(_elements(y)):
        if is_missing(label):
            raise ValueError(
                f"y[{index}] is missing ({label!r}). Each image must have a label. "
                "Remove the image from X and y, or label it."
            )
    labels: NDArray[Any] = check_y(y, estimator=estimator)
    check_classification_targets(labels)
    return labels


def is_missing(value: object) -> bool:
    """Return whether a value is None, NaN, or pandas' NA or NaT."""
    return (
        value is None
        or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
        or type(value).__name__ in ("NAType", "NaTType")
    )


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
