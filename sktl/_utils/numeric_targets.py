"""Validation of the targets of a regressor."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator

from sktl._utils.labels import is_missing
from sktl._utils.sklearn_compat import check_y


def check_numbers(y: Any, estimator: BaseEstimator) -> NDArray[np.float64]:
    """Validate the targets of a regressor.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Numbers.
    estimator : BaseEstimator
        Named in errors.

    Returns
    -------
    ndarray of the shape of `y`, float64

    Raises
    ------
    ValueError
        If an element is missing, infinite or no number: names row and column.
    """
    name = type(estimator).__name__
    if issparse(y):
        raise ValueError(f"{name} requires a dense y. Got a sparse one. Use toarray().")
    # As objects, since NaN beside strings would be the string "nan".
    values = np.asarray(y if hasattr(y, "__array__") else _as_objects(y))
    if values.dtype.kind not in "biufc":
        for index, value in np.ndenumerate(values.astype(object)):
            if not hasattr(value, "__float__") and not is_missing(value):
                raise ValueError(
                    f"{name} requires numbers as y. Got {_element(index)} = {value!r}. "
                    "For class labels, use FineTunedCNNClassifier; convert text or "
                    "dates that stand for numbers."
                )
            _check_finite(index, value)
    elif values.dtype.kind == "f":
        for index in np.argwhere(~np.isfinite(values))[:1].tolist():
            _check_finite(tuple(index), values[tuple(index)].item())
    checked: NDArray[Any] = check_y(
        values, multi_output=True, y_numeric=True, estimator=estimator
    )
    return checked.astype(np.float64)


def _check_finite(index: tuple[int, ...], value: Any) -> None:
    if is_missing(value) or abs(value) == np.inf:
        raise ValueError(
            f"y must be finite numbers. Got {_element(index)} = {value!r}. Remove the "
            "image from X and y, or correct its target."
        )


def _as_objects(y: Any) -> Any:
    try:
        return np.array(y, dtype=object)
    except ValueError:  # rows that do not fit together; `check_y` raises the error
        return y


def _element(index: tuple[int, ...]) -> str:
    return f"y[{', '.join(map(str, index))}]"
