"""Tasks of a fit for the callbacks of scikit-learn: the fit, and each of its epochs."""

from collections.abc import Callable
from typing import Any

from sktl._training.config import TrainingRecord
from sktl._training.initial_model import FittedModel
from sktl._utils.sklearn_compat import init_callback_context


class FitTasks:
    """Calls of the callbacks that `set_callbacks` has set, in scikit-learn 1.9.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        The estimator that is fitted.
    X, y, sample_weight
        Arguments of `fit`, which the callbacks get.
    to_attributes : callable
        Returns the attributes of the estimator if it is fitted, for a model and a
        record.
    """

    def __init__(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        sample_weight: Any,
        to_attributes: Callable[[FittedModel, TrainingRecord], dict[str, Any]],
    ) -> None:
        self._to_attributes = to_attributes
        self._fit = init_callback_context(estimator, max_subtasks=estimator.max_epochs)
        self._epoch: Any = None
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        self._arguments = {
            "estimator": estimator,
            "X": X,
            "y": y,
            "metadata": metadata,
        }
        if self._fit is not None:
            self._fit.call_on_fit_task_begin(**self._arguments)

    def begin_epoch(self) -> None:
        """Begin the task of an epoch."""
        if self._fit is not None:
            self._epoch = self._fit.subcontext(task_name="epoch")
            self._epoch.call_on_fit_task_begin(**self._arguments)

    def end_epoch(
        self, current: Callable[[], tuple[FittedModel, TrainingRecord]]
    ) -> bool:
        """End the task of an epoch; return whether a callback stops the training.

        Parameters
        ----------
        current : callable
            Returns model and record as if the training had ended. It is called only if
            a callback needs a fitted estimator.
        """
        if self._epoch is None:
            return False
        stop: bool = self._epoch.call_on_fit_task_end(
            **self._arguments,
            reconstruction_attributes=lambda: self._to_attributes(*current()),
        )
        return stop

    def end(self) -> None:
        """End the task of the fit; the estimator is fitted."""
        if self._fit is not None:
            self._fit.call_on_fit_task_end(
                **self._arguments, reconstruction_attributes={}
            )
