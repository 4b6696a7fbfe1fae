"""All imports of private names of scikit-learn, and of those of some releases only.

The meaning of the private names has not changed since scikit-learn 1.3. If one moves in
a later release, only this file has to change.
"""

from typing import Any

from sklearn.base import _fit_context as fit_context
from sklearn.utils._param_validation import (
    Interval,
    StrOptions,
    validate_parameter_constraints,
)
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_sample_weight as check_sample_weight
from sklearn.utils.validation import _check_y as check_y

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn below 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands for the class that adds ``set_callbacks`` to an estimator."""


def init_callback_context(estimator: Any, max_subtasks: int) -> Any:
    """Return the context of the callbacks of a fit; None below scikit-learn 1.9.

    Parameters
    ----------
    estimator : estimator
        The estimator that is fitted. `fit_context` calls ``teardown`` of its callbacks.
    max_subtasks : int
        Maximum number of subtasks of the fit.
    """
    if not hasattr(estimator, "set_callbacks"):
        return None
    return estimator._init_callback_context(max_subtasks=max_subtasks)


__all__ = [
    "CallbackSupportMixin",
    "Interval",
    "StrOptions",
    "check_feature_names_in",
    "check_sample_weight",
    "check_y",
    "fit_context",
    "init_callback_context",
    "validate_parameter_constraints",
]
