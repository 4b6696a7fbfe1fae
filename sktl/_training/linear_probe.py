"""Linear probes: the head starts as a model fitted on the frozen features.

Fine-tuning from a random head first distorts the pretrained features. Starting from
the logistic regression on the frozen features avoids that (Kumar et al., *Fine-Tuning
can Distort Pretrained Features and Underperform Out-of-Distribution*, 2022).
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import (
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    StratifiedShuffleSplit,
)
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

from sktl._training.group_splits import grouped_folds

Layers = list[tuple[NDArray[Any], NDArray[Any]]]

# Inverse regularization strengths, as `C` of LogisticRegression.
C_GRID = np.logspace(-4, 1, 6)
_N_FOLDS = 5
_MAX_SINGLE_THREADED = 2**22  # values of the feature matrix
_MIN_FOR_SINGLE_SPLIT = 2000  # images; one held-out fifth is accurate enough then
_MIN_RELATIVE_SCALE = 1e-6  # of the largest standard deviation of a feature
_MAX_ITER = {"logistic_regression": 1000, "mlp": 200}  # both more than needed


def fit_linear_probe(
    head: nn.Module,
    features: NDArray[np.float32],
    y: NDArray[np.intp],
    sample_weight: NDArray[np.float64],
    *,
    groups: NDArray[np.intp] | None = None,
    hidden_layer_sizes: Sequence[int] = (),
    seed: int = 0,
) -> float:
    """Set the weights of a head to those of a regularized logistic regression.

    With hidden layers, to those of a multilayer perceptron. The model is fitted on
    standardized features and its coefficients are scaled back. The regularization
    strength is the one with the least cross-validated log loss.

    Parameters
    ----------
    head : nn.Module
        Its linear layers are overwritten.
    features : ndarray of shape (n_samples, n_features), float32
        Input of the head.
    y : ndarray of shape (n_samples,)
        Encoded targets, from 0 to the number of outputs of the head minus one. Every
        class must occur.
    sample_weight : ndarray of shape (n_samples,)
        Sample weights of mean 1, so that the regularization has the usual scale.
    groups : ndarray of shape (n_samples,), int, or None, default=None
        Groups that no fold of the cross-validation divides.
    hidden_layer_sizes : sequence of int, default=()
        Widths of the hidden layers of the head.
    seed : int, default=0
        Seed of the folds and of the initial weights of a perceptron.

    Returns
    -------
    float
        The selected inverse regularization strength, as `C` of
        :obj:`sklearn.linear_model.LogisticRegression`.
    """
    x, scaler = standardize(features, sample_weight)
    hidden = tuple(hidden_layer_sizes)
    with quiet_probe(x):
        C = select_C(x, y, sample_weight, groups, hidden, seed)
        model = fit_model(C, x, y, sample_weight, hidden, seed)
    layers = layers_of(model)
    matrix, bias = layers[-1]
    if matrix.shape[1] == 1:  # log-odds z of two classes are the logits -z/2 and z/2
        layers[-1] = (matrix * [[-0.5, 0.5]], bias * [-0.5, 0.5])
    copy_layers(layers, scaler, head)
    return C


def standardize(
    features: NDArray[np.float32], sample_weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], StandardScaler]:
    """Return standardized features, and the scaler, for `copy_layers`.

    Parameters
    ----------
    features : ndarray of shape (n_samples, n_features), float32
        Input of the head.
    sample_weight : ndarray of shape (n_samples,)
        Sample weights.

    Returns
    -------
    x : ndarray of shape (n_samples, n_features), float64
    scaler : StandardScaler
    """
    scaler = StandardScaler().fit(features, sample_weight=sample_weight)
    # A feature that is constant up to rounding is not scaled up to unit variance.
    min_scale = _MIN_RELATIVE_SCALE * np.sqrt(scaler.var_.max())
    scaler.scale_ = np.maximum(scaler.scale_, min_scale)
    return scaler.transform(features.astype(np.float64)), scaler


@contextlib.contextmanager
def quiet_probe(x: NDArray[np.float64]) -> Iterator[None]:
    """Limit the threads and the warnings of scikit-learn while probes are fitted.

    Parameters
    ----------
    x : ndarray of shape (n_samples, n_features)
        Features that the probes are fitted on.
    """
    # Threads slow down products of small matrices: a perceptron on 200 images took ten
    # times as long with two threads as with one.
    n_threads = 1 if x.size < _MAX_SINGLE_THREADED else None
    with warnings.catch_warnings(), threadpool_limits(n_threads, "blas"):
        # The head need not be optimal, since training continues from it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A fold may have few images of a class where the whole data set has many.
        warnings.filterwarnings("ignore", "The number of unique classes")
        yield


def folds(
    n_samples: int,
    groups: NDArray[np.intp] | None,
    seed: int,
    y: NDArray[np.intp] | None = None,
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return the folds to select a regularization strength on.

    Parameters
    ----------
    n_samples : int
        Number of images.
    groups : ndarray of shape (n_samples,), int, or None
        Groups that no fold divides. None: each image is one of its own.
    seed : int
        Seed of the folds.
    y : ndarray of shape (n_samples,), int, or None, default=None
        Class of each image, to stratify by. None: there are no classes.

    Returns
    -------
    list of pairs of ndarray of int
        Positions of the images to train on, and of those held out. Empty if there are
        fewer than two images (of a class), or groups.
    """
    is_large = n_samples >= _MIN_FOR_SINGLE_SPLIT
    if groups is not None:
        grouped = grouped_folds(y, groups, n_folds=_N_FOLDS, seed=seed)
        return list(itertools.islice(grouped, 1 if is_large else None))
    smallest_class = n_samples if y is None else int(np.bincount(y).min())
    if smallest_class < 2:
        return []
    splitter: Any
    if is_large:
        # At least one image of each class on average, as scikit-learn requires.
        n_valid = max(-(-n_samples // 5), 0 if y is None else int(y.max()) + 1)
        kind = ShuffleSplit if y is None else StratifiedShuffleSplit
        splitter = kind(1, test_size=n_valid, random_state=seed)
    else:
        kind = KFold if y is None else StratifiedKFold
        n_folds = min(_N_FOLDS, smallest_class)
        splitter = kind(n_folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.arange(n_samples), y))


def best_strength(strengths: NDArray[Any], losses: NDArray[np.float64]) -> float:
    """Return the strength of the least loss; the middle one if there are no folds."""
    return float(strengths[losses.argmin() if losses.any() else len(strengths) // 2])


def select_C(
    x: NDArray[np.float64],
    y: NDArray[np.intp],
    sample_weight: NDArray[np.float64],
    groups: NDArray[np.intp] | None,
    hidden: tuple[int, ...],
    seed: int,
) -> float:
    """Return the C of `C_GRID` with the least log loss on held-out folds."""
    losses = np.zeros(len(C_GRID))
    for train, valid in folds(len(y), groups, seed, y):
        if not sample_weight[valid].any():
            continue
        for i, C in enumerate(C_GRID):
            model = fit_model(C, x[train], y[train], sample_weight[train], hidden, seed)
            losses[i] += log_loss(
                y[valid],
                model.predict_proba(x[valid]),
                labels=model.classes_,
                sample_weight=sample_weight[valid],
            )
    return best_strength(C_GRID, losses)


def fit_model(
    C: float,
    x: NDArray[np.float64],
    y: NDArray[np.intp],
    sample_weight: NDArray[np.float64],
    hidden: tuple[int, ...],
    seed: int,
) -> Any:
    model: Any
    if hidden:
        # Its penalty is alpha / n, that of the logistic regression 1 / (C n).
        model = MLPClassifier(
            hidden,
            solver="lbfgs",
            alpha=1 / C,
            max_iter=_MAX_ITER["mlp"],
            random_state=seed,
        )
    else:
        model = LogisticRegression(C=C, max_iter=_MAX_ITER["logistic_regression"])
    return model.fit(x, y, sample_weight=sample_weight)


def layers_of(model: Any) -> Layers:
    """Return the coefficients of a fitted perceptron or linear model.

    Returns
    -------
    list of pairs of ndarray, of shapes (n_inputs, n_outputs) and (n_outputs,)
        One for each linear layer.
    """
    if hasattr(model, "coefs_"):
        return list(zip(model.coefs_, model.intercepts_, strict=True))
    return [(np.atleast_2d(model.coef_).T, np.atleast_1d(model.intercept_))]


def copy_layers(layers: Layers, scaler: StandardScaler, head: nn.Module) -> None:
    """Copy coefficients to the linear layers of a head.

    Parameters
    ----------
    layers : list of pairs of ndarray
        From `layers_of`, of a model of standardized features.
    scaler : StandardScaler
        From `standardize`.
    head : nn.Module
        Its linear layers are overwritten.
    """
    layers = list(layers)
    # The first layer takes features that are not standardized.
    matrix, bias = layers[0]  # (n_features, n_outputs), (n_outputs,)
    matrix = matrix / scaler.scale_[:, None]
    layers[0] = matrix, bias - scaler.mean_ @ matrix
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module, (matrix, bias) in zip(linear, layers, strict=True):
            module.weight.copy_(torch.from_numpy(matrix.T))
            module.bias.copy_(torch.from_numpy(bias))
