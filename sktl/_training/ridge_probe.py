"""Linear probe of a regressor: a ridge regression on the frozen features."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPRegressor
from torch import nn

from sktl._training.linear_probe import (
    best_strength,
    copy_layers,
    folds,
    layers_of,
    quiet_probe,
    standardize,
)

# Regularization strengths, as `alpha` of Ridge. The last one is chosen if the features
# say nothing about the targets.
ALPHA_GRID = np.logspace(-2, 5, 8)
_MAX_ITER = 200  # of a perceptron

#: Losses ``(n_samples,)`` of outputs and encoded targets ``(n_samples, n_outputs)``.
Losses = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]


def fit_ridge_probe(
    head: nn.Module,
    features: NDArray[np.float32],
    y: NDArray[Any],
    sample_weight: NDArray[np.float64],
    losses: Losses,
    *,
    groups: NDArray[np.intp] | None = None,
    hidden_layer_sizes: Sequence[int] = (),
    seed: int = 0,
) -> float:
    """Set the weights of a head to those of a ridge regression.

    With hidden layers, to those of a multilayer perceptron. The model is fitted on
    standardized features and its coefficients are scaled back. The regularization
    strength is the one with the least cross-validated loss.

    Parameters
    ----------
    head : nn.Module
        Its linear layers are overwritten.
    features : ndarray of shape (n_samples, n_features), float32
        Input of the head.
    y : ndarray of shape (n_samples, n_outputs)
        Encoded targets.
    sample_weight : ndarray of shape (n_samples,)
        Sample weights of mean 1, so that the regularization has the usual scale.
    losses : callable
        Losses that the strengths are compared by.
    groups : ndarray of shape (n_samples,), int, or None, default=None
        Groups that no fold of the cross-validation divides.
    hidden_layer_sizes : sequence of int, default=()
        Widths of the hidden layers of the head.
    seed : int, default=0
        Seed of the folds and of the initial weights of a perceptron.

    Returns
    -------
    float
        The selected strength, as `alpha` of :obj:`sklearn.linear_model.Ridge`.
    """
    x, scaler = standardize(features, sample_weight)
    y = y.astype(np.float64)
    hidden = tuple(hidden_layer_sizes)
    predict = _predict_perceptrons if hidden else _predict_ridge
    totals = np.zeros(len(ALPHA_GRID))
    with quiet_probe(x):
        for train, valid in folds(len(x), groups, seed):
            predictions = predict(
                x[train], y[train], sample_weight[train], x[valid], hidden, seed
            )
            for i, outputs in enumerate(predictions):
                totals[i] += losses(outputs, y[valid]) @ sample_weight[valid]
        alpha = best_strength(ALPHA_GRID, totals)
        model: Any = Ridge(alpha=alpha)
        if hidden:
            model, y = _perceptron(alpha, hidden, seed), _as_column(y)
        model.fit(x, y, sample_weight=sample_weight)
    copy_layers(layers_of(model), scaler, head)
    return alpha


def _predict_ridge(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sample_weight: NDArray[np.float64],
    x_valid: NDArray[np.float64],
    hidden: tuple[int, ...],
    seed: int,
) -> list[NDArray[np.float64]]:
    """Return predictions ``(n_valid, n_outputs)`` for each strength."""
    # One strength per output, so that all share one product of the features.
    n_alphas, n_outputs = len(ALPHA_GRID), y.shape[1]
    model = Ridge(alpha=np.repeat(ALPHA_GRID, n_outputs))
    model.fit(x, np.tile(y, n_alphas), sample_weight=sample_weight)
    outputs = model.predict(x_valid).reshape(len(x_valid), n_alphas, n_outputs)
    return list(outputs.swapaxes(0, 1))


def _predict_perceptrons(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sample_weight: NDArray[np.float64],
    x_valid: NDArray[np.float64],
    hidden: tuple[int, ...],
    seed: int,
) -> list[NDArray[np.float64]]:
    """Return predictions ``(n_valid, n_outputs)`` for each strength."""
    predictions = []
    for alpha in ALPHA_GRID:
        model = _perceptron(alpha, hidden, seed)
        model.fit(x, _as_column(y), sample_weight=sample_weight)
        predictions.append(model.predict(x_valid).reshape(len(x_valid), -1))
    return predictions


def _as_column(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return targets in the shape that a perceptron takes without a warning."""
    return y[:, 0] if y.shape[1] == 1 else y


def _perceptron(alpha: float, hidden: tuple[int, ...], seed: int) -> MLPRegressor:
    return MLPRegressor(
        hidden_layer_sizes=hidden,
        solver="lbfgs",
        alpha=alpha,
        max_iter=_MAX_ITER,
        random_state=seed,
    )
