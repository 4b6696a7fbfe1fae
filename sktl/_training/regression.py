"""Regression targets: one or several numbers per image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.nn import functional as F

from sktl._training.ridge_probe import fit_ridge_probe
from sktl._training.scoring_net import RegressorNet
from sktl._training.targets import (
    EncodedTargets,
    Target,
    check_n_columns,
    check_not_none,
    check_same_kind,
    positive_weights,
)
from sktl._utils.json_values import get_value, is_list_of, require
from sktl._utils.numeric_targets import check_numbers

SQUARED_ERROR, ABSOLUTE_ERROR, HUBER = "squared_error", "absolute_error", "huber"
LOSSES = (SQUARED_ERROR, ABSOLUTE_ERROR, HUBER)  # parameter loss

# Threshold of the Huber loss, in robust standard deviations: as efficient as least
# squares to 95 % if the errors are normal (Huber, *Robust Statistics*, 1981).
_HUBER_DELTA = 1.345
# The ridge regression minimizes a squared error, also if `loss` is a robust one. It is
# then fitted on targets that are clipped to so many robust standard deviations.
_MAX_ROBUST_TARGET = 4.0
_MAX_STANDARDIZED = 1e12  # the square has a float32
_MAD_OF_NORMAL = 0.6745  # median absolute deviation of a standard normal variable


def elementwise_loss(loss: str, errors: Tensor) -> Tensor:
    """Return the losses of errors in standardized units, of the same shape."""
    if loss == SQUARED_ERROR:
        return errors.square()
    if loss == ABSOLUTE_ERROR:
        return errors.abs()
    zeros = torch.zeros_like(errors)
    return F.huber_loss(errors, zeros, reduction="none", delta=_HUBER_DELTA)


class WeightedRegressionLoss(nn.Module):
    """Mean over a batch of the losses times the sample weights.

    Parameters
    ----------
    loss : str
        One of `LOSSES`.
    """

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of outputs and targets ``(n, n_outputs)``, and weights."""
        y, sample_weight = target
        # (n, n_outputs) -> (n,); a sum of other shapes would be that of all pairs.
        errors = outputs.float() - y.view_as(outputs)
        losses = elementwise_loss(self.loss, errors).mean(dim=1)
        return (losses * sample_weight).mean()


@dataclass(frozen=True, eq=False)
class RegressionTarget:
    """Target of one or several numbers; implements `sktl._training.targets.Target`.

    An encoded target is the standardized target: without its center and divided by its
    scale.

    Attributes
    ----------
    center, scale : ndarray of shape (n_outputs,), float64
        Of the targets of the first fit.
    ndim : int
        Number of dimensions of the predictions: 1 or 2.
    loss_name : str, default="squared_error"
        One of `LOSSES`.
    """

    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    ndim: int
    loss_name: str = SQUARED_ERROR

    # A few steps change every prediction, where few classes would change.
    prefers_probe = True
    output_lr_factor = 1.0

    @property
    def n_outputs(self) -> int:
        """Number of numbers per image."""
        return len(self.center)

    def encode(
        self, y: Any, name: str, estimator: BaseEstimator
    ) -> NDArray[np.float32]:
        """Validate and standardize further targets, named in errors by `name`."""
        numbers = check_numbers(y, estimator, name)
        numbers = numbers.reshape(len(numbers), -1)  # (n,) -> (n, 1)
        check_n_columns(numbers, self, name)
        _check_range(numbers, self, np.arange(len(numbers)), name)
        return self.standardize(numbers)

    def standardize(self, y: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the standardized targets ``(n, n_outputs)``."""
        standardized: NDArray[np.float64] = (y - self.center) / self.scale
        return standardized.astype(np.float32)

    def loss(self) -> nn.Module:
        """Return the weighted loss in standardized units."""
        return WeightedRegressionLoss(self.loss_name)

    def score(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> float:
        """Return the weighted coefficient of determination, averaged over outputs.

        It equals that of scikit-learn's `r2_score`, which is undefined for one image:
        then, as where all targets are equal, it is 1 if the prediction is exact, else
        0.
        """
        weight = sample_weight[:, None]
        outputs, y = outputs.astype(np.float64), y.astype(np.float64)
        errors = (weight * (y - outputs) ** 2).sum(axis=0)
        mean = np.average(y, axis=0, weights=sample_weight)
        total = (weight * (y - mean) ** 2).sum(axis=0)
        varies = (y != y[0]).any(axis=0)
        defined = 1 - errors / np.where(varies, total, 1)
        return float(np.where(varies, defined, errors == 0).mean())

    def calibrated_losses(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the weighted losses in standardized units; nothing is calibrated."""
        return self._losses(outputs, y) * sample_weight / sample_weight.mean()

    def _losses(self, outputs: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
        """Return the losses ``(n,)`` of outputs ``(n, n_outputs)``."""
        errors = torch.from_numpy(outputs.astype(np.float64) - y)
        losses: NDArray[np.float64] = elementwise_loss(self.loss_name, errors).numpy()
        return losses.mean(axis=1)

    def initialize_head(
        self,
        head: nn.Module,
        features: NDArray[np.float32],
        y: NDArray[Any],
        sample_weight: NDArray[np.float64],
        *,
        groups: NDArray[np.intp] | None,
        hidden_layer_sizes: Sequence[int],
        seed: int,
    ) -> None:
        """Set the weights of the head to those of a ridge regression."""
        if self.loss_name != SQUARED_ERROR:
            y = y.clip(-_MAX_ROBUST_TARGET, _MAX_ROBUST_TARGET)
        fit_ridge_probe(
            head,
            features,
            y,
            sample_weight,
            self._losses,
            groups=groups,
            hidden_layer_sizes=hidden_layer_sizes,
            seed=seed,
        )

    def check_unchanged(self, previous: Target, caller: str) -> None:
        """Raise a ValueError if a previous fit had another number of outputs."""
        check_same_kind(self, previous, caller)
        if self.n_outputs != previous.n_outputs:
            raise ValueError(
                f"{caller} must get as many targets as the first fit, which had "
                f"{previous.n_outputs} per image. Got {self.n_outputs}."
            )

    def is_complete(self, y: NDArray[Any]) -> bool:
        """Return True: a ridge regression can be fitted on any targets."""
        return True

    def strata(self, y: NDArray[Any]) -> None:
        """Return None: a split is random."""

    def decode(self, outputs: NDArray[Any]) -> NDArray[np.float64]:
        """Return the predictions in the units of the targets.

        Parameters
        ----------
        outputs : ndarray of shape (n_samples, n_outputs)
            Outputs of the network.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_outputs), float64
        """
        y = outputs.astype(np.float64) * self.scale + self.center
        return y[:, 0] if self.ndim == 1 else y

    def labels(self, y: NDArray[Any]) -> NDArray[np.float64]:
        """Return the targets, with the precision of the encoded ones."""
        return self.decode(y)

    def scoring_net(self, net: Any) -> RegressorNet:
        """Return a view of the net that predicts in the units of the targets."""
        return RegressorNet(net, self)

    def fingerprint(self) -> dict[str, Any]:
        """Return center and scale."""
        return {"center": self.center.tolist(), "scale": self.scale.tolist()}

    def to_document(self) -> dict[str, Any]:
        """Return the standardization as values that JSON can hold."""
        return {
            "kind": "regression",
            "n_outputs": self.n_outputs,
            "ndim": self.ndim,
            **self.fingerprint(),
        }


def regression_from_document(document: dict[str, Any]) -> RegressionTarget:
    """Return the target that `RegressionTarget.to_document` describes.

    Parameters
    ----------
    document : dict
        From a file; anything may be in it.

    Returns
    -------
    RegressionTarget

    Raises
    ------
    ValueError
        If it is not such a description.
    """
    n_outputs = get_value(document, "n_outputs", int)
    ndim = get_value(document, "ndim", int)
    center, scale = (get_value(document, name, list) for name in ("center", "scale"))
    require(
        is_list_of(center + scale, float)
        and len(center) == len(scale) == n_outputs > 0
        and all(map(math.isfinite, center + scale))
        and min(scale) > 0,
        "its center and scale must be finite numbers, one for each output",
    )
    require(ndim == 2 or (ndim == n_outputs == 1), "its ndim must be 1 or 2")
    return RegressionTarget(np.array(center), np.array(scale), ndim)


def encode_regression(
    n_samples: int,
    y: Any,
    sample_weight: Any,
    *,
    loss: str,
    n_least: int = 2,
    previous: Target | None = None,
    estimator: BaseEstimator,
) -> EncodedTargets:
    """Validate and encode numbers and weights.

    Parameters
    ----------
    n_samples : int
        Number of images.
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Numbers.
    sample_weight : array-like of shape (n_samples,) or None
        Weights of the samples. None: 1 for each.
    loss : str
        One of `LOSSES`.
    n_least : int, default=2
        Least number of samples.
    previous : Target or None, default=None
        Target of the model that the training continues with, whose outputs are in its
        units.
    estimator : BaseEstimator
        Named in errors.

    Returns
    -------
    EncodedTargets
        Of the samples whose weight is not 0.

    Raises
    ------
    ValueError
        If `y` is not made of finite numbers, lengths differ, all weights are 0, or
        there are too few samples.
    """
    check_not_none(y, estimator)
    numbers = check_numbers(y, estimator)
    rows, weight = positive_weights(n_samples, numbers, sample_weight)
    if len(rows) < n_least:
        raise ValueError(
            f"{type(estimator).__name__} requires at least two images of positive "
            f"weight. Got n_samples = {len(rows)}. Add images, or use partial_fit."
        )
    ndim = numbers.ndim
    numbers = numbers.reshape(len(numbers), -1)[rows]  # (n,) -> (n, 1)
    if previous is not None and previous.n_outputs == numbers.shape[1]:
        same = cast(RegressionTarget, previous)
        target = RegressionTarget(same.center, same.scale, ndim, loss)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # see _check_range
            columns = [standardization(column, weight, loss) for column in numbers.T]
        center, scale = np.array(columns).T
        target = RegressionTarget(center, scale, ndim, loss)
    _check_range(numbers, target, rows)
    return EncodedTargets(target, rows, target.standardize(numbers), weight)


def standardization(
    y: NDArray[np.float64], sample_weight: NDArray[np.float64], loss: str
) -> tuple[float, float]:
    """Return the center and the scale of the targets of one output.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Targets.
    sample_weight : ndarray of shape (n,)
        Positive weights.
    loss : str
        ``"squared_error"``: mean and standard deviation. Else the median, and the
        median absolute deviation (if it is 0, the mean one) as an estimate of the
        standard deviation, which outliers do not affect.

    Returns
    -------
    center, scale : float
        The scale of constant targets is 1.
    """
    if y.min() == y.max():
        return float(y[0]), 1.0
    if loss == SQUARED_ERROR:
        center = float(np.average(y, weights=sample_weight))
        deviations = np.abs(y - center)
        largest = deviations.max()  # so that no square overflows
        squares = np.average((deviations / largest) ** 2, weights=sample_weight)
        return center, float(largest * math.sqrt(squares))
    center = _weighted_median(y, sample_weight)
    deviations = np.abs(y - center)
    scale = _weighted_median(deviations, sample_weight) / _MAD_OF_NORMAL
    return center, scale or float(np.average(deviations, weights=sample_weight))


def _check_range(
    y: NDArray[np.float64],
    target: RegressionTarget,
    rows: NDArray[np.intp],
    name: str = "y",
) -> None:
    """Raise a ValueError if a standardized target is too large for float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.abs(y - target.center) / target.scale
    # NaN, if center or scale overflow, is not less either.
    too_far = np.argwhere(~(distance < _MAX_STANDARDIZED))
    if len(too_far):
        row, column = too_far[0].tolist()
        raise ValueError(
            f"{name} must have a scale. Got {y[row, column]} in row {rows[row]}, "
            f"column {column}: more than {_MAX_STANDARDIZED:.0e} times the deviation "
            f"of the others from the center {target.center[column]}. Correct it, or "
            "transform y, for example by TransformedTargetRegressor."
        )


def _weighted_median(y: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """Return the least value with half of the weight at or below it."""
    order = np.argsort(y, kind="stable")
    total = np.cumsum(weight[order])
    return float(y[order[np.searchsorted(total, total[-1] / 2)]])
