"""Linear probe of several labels: a logistic regression for each of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neural_network import MLPClassifier
from torch import nn

from sktl._training import linear_probe
from sktl._training.linear_probe import (
    best_strength,
    copy_layers,
    fit_model,
    folds,
    layers_of,
    quiet_probe,
    select_C,
    standardize,
)

_EPSILON = 1e-7  # of a probability in a log loss


def fit_multilabel_probe(
    head: nn.Module,
    features: NDArray[np.float32],
    y: NDArray[Any],
    sample_weight: NDArray[np.float64],
    class_weights: NDArray[np.float64],
    *,
    groups: NDArray[np.intp] | None = None,
    hidden_layer_sizes: Sequence[int] = (),
    seed: int = 0,
) -> None:
    """Set the weights of a head to those of one logistic regression per label.

    With hidden layers, to those of a multilayer perceptron, without class weights. The
    regularization strengths are those with the least cross-validated log loss.

    Parameters
    ----------
    head : nn.Module
        Its linear layers are overwritten.
    features : ndarray of shape (n_samples, n_features), float32
        Input of the head.
    y : ndarray of shape (n_samples, n_labels)
        Indicator matrix. A label that always or never occurs gets a constant.
    sample_weight : ndarray of shape (n_samples,)
        Sample weights of mean 1.
    class_weights : ndarray of shape (n_labels, 2)
        Weights of 0 and 1 for each label.
    groups : ndarray of shape (n_samples,), int, or None, default=None
        Groups that no fold of the cross-validation divides.
    hidden_layer_sizes : sequence of int, default=()
        Widths of the hidden layers of the head.
    seed : int, default=0
        Seed of the folds and of the initial weights of a perceptron.
    """
    x, scaler = standardize(features, sample_weight)
    y = y.astype(np.intp)
    hidden = tuple(hidden_layer_sizes)
    with quiet_probe(x):
        if hidden:
            layers = layers_of(
                _fit_perceptron(x, y, sample_weight, groups, hidden, seed)
            )
        else:
            columns = [
                _fit_label(x, labels, sample_weight * weights[labels], groups, seed)
                for labels, weights in zip(y.T, class_weights, strict=True)
            ]
            matrices, biases = zip(*columns, strict=True)
            layers = [(np.column_stack(matrices), np.array(biases))]
    copy_layers(layers, scaler, head)


def _fit_label(
    x: NDArray[np.float64],
    y: NDArray[np.intp],
    sample_weight: NDArray[np.float64],
    groups: NDArray[np.intp] | None,
    seed: int,
) -> tuple[NDArray[np.float64], float]:
    """Return the coefficients and the intercept of one label."""
    # A class weight of 0 removes images.
    kept = sample_weight > 0
    x, y, weight = x[kept], y[kept], sample_weight[kept]
    groups = None if groups is None else groups[kept]
    n, n_positive = len(y), int(y.sum())
    if not 0 < n_positive < n:
        # The log-odds of the rate with half an image added to each side.
        return np.zeros(x.shape[1]), float(
            np.log((n_positive + 0.5) / (n + 0.5 - n_positive))
        )
    weight = weight / weight.mean()
    C = select_C(x, y, weight, groups, (), seed)
    model = fit_model(C, x, y, weight, (), seed)
    return model.coef_[0], float(model.intercept_[0])


def _fit_perceptron(
    x: NDArray[np.float64],
    y: NDArray[np.intp],
    sample_weight: NDArray[np.float64],
    groups: NDArray[np.intp] | None,
    hidden: tuple[int, ...],
    seed: int,
) -> MLPClassifier:
    """Return a perceptron with one output per label, of the best strength."""
    grid = linear_probe.C_GRID
    losses = np.zeros(len(grid))
    for train, valid in folds(len(x), groups, seed):
        for i, C in enumerate(grid):
            model = fit_model(C, x[train], y[train], sample_weight[train], hidden, seed)
            proba = model.predict_proba(x[valid]).clip(_EPSILON, 1 - _EPSILON)
            likelihood = np.where(y[valid] == 1, proba, 1 - proba)  # (n, n_labels)
            losses[i] -= sample_weight[valid] @ np.log(likelihood).mean(axis=1)
    C = best_strength(grid, losses)
    best: MLPClassifier = fit_model(C, x, y, sample_weight, hidden, seed)
    return best
