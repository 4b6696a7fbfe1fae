"""Validation of the targets of a regressor."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator

from sktl._utils.labels import is_missing
from sktl._utils.sklearn_compat import check_y


def check_numbers(
    y: Any, estimator: BaseEstimator, argument: str = "y"
) -> NDArray[np.float64]:
    """Validate the targets of a regressor.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Numbers.
    estimator : BaseEstimator
        Named in errors.
    argument : str, default="y"
        Name of the argument in errors.

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
        raise ValueError(
            f"{name} requires a dense {argument}. Got a sparse one. Use toarray()."
        )
    values = np.asarray(y)
    if values.dtype.kind not in "biufc":
        if not hasattr(y, "__array__"):  # NaN beside strings is the string "nan"
            values = np.asarray(y, dtype=object)
        if values.dtype.kind in "mM":  # an element in nanoseconds would be an int
            values = values.astype(f"{values.dtype.kind}8[us]")
        for index, value in np.ndenumerate(values.astype(object)):
            if not hasattr(value, "__float__") and not is_missing(value):
                raise ValueError(
                    f"{name} requires numbers as {argument}. Got "
                    f"{_element(argument, index)} = {value!r}. "
                    "For class labels, use FineTunedCNNClassifier; convert text or "
                    "dates that stand for numbers."
                )
            _check_finite(argument, index, value)
    elif values.dtype.kind == "f":
        for index in np.argwhere(~np.isfinite(values))[:1].tolist():
            _check_finite(argument, tuple(index), values[tuple(index)].item())
    checked: NDArray[Any] = check_y(
        values, multi_output=True, y_numeric=True, estimator=estimator
    )
    return checked.astype(np.float64)


def _check_finite(argument: str, index: tuple[int, ...], value: Any) -> None:
    if is_missing(value) or abs(value) == np.inf:
        raise ValueError(
            f"{argument} must be finite numbers. Got {_element(argument, index)} = "
            f"{value!r}. Remove the image and its target, or correct the target."
        )


def _element(argument: str, index: tuple[int, ...]) -> str:
    return f"{argument}[{', '.join(map(str, index))}]" if index else argument
