"""Validation of indicator matrices, which have one column per label."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator

from sktl._utils.labels import is_missing


def has_several_columns(y: Any) -> bool:
    """Return whether targets have several columns, rather than one label per image.

    Parameters
    ----------
    y : array-like or sparse matrix
        Anything that was passed as the target.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        If each element is a collection of labels, which must be converted before.
    """
    if issparse(y):
        return bool(y.shape[1] > 1)
    if isinstance(y, list | tuple) and any(isinstance(v, set | frozenset) for v in y):
        raise _collections_of_labels()
    try:
        shape = np.asarray(y).shape
    except ValueError as error:  # rows of different lengths
        raise _collections_of_labels() from error
    return len(shape) == 2 and shape[1] > 1


def check_indicator_matrix(
    y: Any, estimator: BaseEstimator, argument: str = "y"
) -> NDArray[np.uint8]:
    """Validate the labels of images, of which each may have several.

    Parameters
    ----------
    y : array-like or sparse matrix of shape (n_samples, n_labels)
        1 (or True) where an image has a label, else 0.
    estimator : BaseEstimator
        Named in errors.
    argument : str, default="y"
        Name of the argument in errors.

    Returns
    -------
    ndarray of shape (n_samples, n_labels), uint8

    Raises
    ------
    ValueError
        If an element is not 0 or 1: names row and column.
    """
    values = np.asarray(y.toarray() if issparse(y) else y)
    if values.dtype.kind in "US":  # the element that is text, and not all of them
        values = np.asarray(y, dtype=object)
    if values.dtype.kind in "biuf":
        is_valid = (values == 0) | (values == 1)
    else:
        valid = [not is_missing(v) and v in (0, 1) for v in values.ravel().tolist()]
        is_valid = np.array(valid).reshape(values.shape)
    wrong = np.argwhere(~is_valid)
    if len(wrong):
        row, column = wrong[0].tolist()
        where = f"{argument}[{row}, {column}]"
        raise _wrong_element(values[row, column], where, type(estimator).__name__)
    return values.astype(np.uint8)


def _wrong_element(value: Any, where: str, name: str) -> ValueError:
    if isinstance(value, np.generic):
        value = value.item()
    if is_missing(value):
        return ValueError(
            f"{where} is missing ({value!r}). Each image must have a 0 or 1 for each "
            "label. Remove the image and its labels, or label it."
        )
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return ValueError(
            f"Unknown label type: continuous-multioutput. {name} requires 0 and 1 if y "
            f"has several columns. Got {where} = {value!r}. To predict numbers, use "
            "FineTunedCNNRegressor."
        )
    return ValueError(
        f"{name} requires 0 and 1 if y has several columns, one for each label. Got "
        f"{where} = {value!r}. For several columns of classes, use "
        "sklearn.multioutput.MultiOutputClassifier, which fits an estimator for each "
        "column."
    )


def _collections_of_labels() -> ValueError:
    return ValueError(
        "y must have one label per image, or be an indicator matrix. Got a collection "
        "of labels for each image. Convert it by "
        "sklearn.preprocessing.MultiLabelBinarizer."
    )
