"""How a new head starts: as the model that scikit-learn finds on the frozen features.

Fine-tuning from a random head first destroys what the network knows, to make room for
an answer that a logistic regression would have found at once. So the head is solved
first and handed over (Kumar et al., *Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution*, 2022).
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

# Inverse strengths of the penalty, from strong to weak, as `C` of LogisticRegression.
C_GRID = np.logspace(-4, 1, 6)
_N_FOLDS = 5
_SMALL = 2**22  # values of the features
_MANY = 2000  # images; from here on one held-out fifth tells enough
_LEAST_SCALE = 1e-6  # of the largest deviation of a feature
_MAX_ITER = {"regression": 1000, "perceptron": 200}  # scikit-learn's, and ample


def fit_linear_probe(
    head: nn.Module,
    features: NDArray[np.float32],
    label: NDArray[np.intp],
    weight: NDArray[np.float64],
    *,
    hidden_layer_sizes: Sequence[int] = (),
    seed: int = 0,
) -> float:
    """Put the coefficients of a regularized logistic regression into a head.

    With hidden layers, those of a multilayer perceptron. Features are standardized
    for it, and the coefficients scaled back. The strength of the penalty is the one
    with the least cross-validated log loss.

    Parameters
    ----------
    head : nn.Module
        Its linear layers are overwritten.
    features : ndarray of shape (n_samples, n_features), float32
        What the head sees.
    label : ndarray of shape (n_samples,)
        From 0 to one less than the number of outputs of the head. All occur.
    weight : ndarray of shape (n_samples,)
        How much each sample counts, in the penalty's scale: 1 on average.
    hidden_layer_sizes : sequence of int
        Widths of the hidden layers of the head.
    seed : int, default=0
        For the folds, and where a perceptron starts.

    Returns
    -------
    float
        The inverse strength chosen, as `C` of
        :obj:`sklearn.linear_model.LogisticRegression`.
    """
    scaler = StandardScaler().fit(features, sample_weight=weight)
    # A column next to all others constant is one, not a denormal made as large as they.
    scaler.scale_ = np.maximum(scaler.scale_, _LEAST_SCALE * np.sqrt(scaler.var_.max()))
    x = scaler.transform(features.astype(np.float64))
    hidden = tuple(hidden_layer_sizes)
    with warnings.catch_warnings(), threadpool_limits(_n_threads(x), "blas"):
        # A start need not be the optimum: training goes on from there.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # That there are few images of a class is so of a fold, not of what is given.
        warnings.filterwarnings("ignore", "The number of unique classes")
        C = select_C(x, label, weight, hidden, seed)
        model = _fitted(C, x, label, weight, hidden, seed)
    if hidden:
        layers = list(zip(model.coefs_, model.intercepts_, strict=True))
    else:
        layers = [(model.coef_.T, model.intercept_)]
    matrix, bias = layers[0]  # (n_features, n_outputs), (n_outputs,)
    matrix = matrix / scaler.scale_[:, None]
    layers[0] = matrix, bias - scaler.mean_ @ matrix
    matrix, bias = layers[-1]
    if matrix.shape[1] == 1:  # log-odds z of two classes are the logits -z/2 and z/2
        layers[-1] = (matrix * [[-0.5, 0.5]], bias * [-0.5, 0.5])
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module, (matrix, bias) in zip(linear, layers, strict=True):
            module.weight.copy_(torch.from_numpy(matrix.T))
            module.bias.copy_(torch.from_numpy(bias))
    return C


def _n_threads(x: NDArray[np.float64]) -> int | None:
    # Of a product of small matrices, threads spend most of their time waiting for each
    # other: a perceptron on 200 images took ten times as long on two as on one.
    return 1 if x.size < _SMALL else None


def select_C(
    x: NDArray[np.float64],
    label: NDArray[np.intp],
    weight: NDArray[np.float64],
    hidden: tuple[int, ...],
    seed: int,
) -> float:
    smallest = int(np.bincount(label).min())
    splitter: Any
    if smallest < 2:  # a single image of a class cannot be learned and tested on
        return float(C_GRID[len(C_GRID) // 2])
    if len(label) >= _MANY:
        # At least one image of each class on average, or scikit-learn refuses.
        n_held_out = max(-(-len(label) // 5), int(label.max()) + 1)
        splitter = StratifiedShuffleSplit(1, test_size=n_held_out, random_state=seed)
    else:
        n_folds = min(_N_FOLDS, smallest)
        splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    losses = np.zeros(len(C_GRID))
    for train, test in splitter.split(x, label):
        if not weight[test].any():
            continue
        for i, C in enumerate(C_GRID):
            model = _fitted(C, x[train], label[train], weight[train], hidden, seed)
            losses[i] += log_loss(
                label[test],
                model.predict_proba(x[test]),
                labels=model.classes_,
                sample_weight=weight[test],
            )
    return float(C_GRID[losses.argmin()])


def _fitted(
    C: float,
    x: NDArray[np.float64],
    label: NDArray[np.intp],
    weight: NDArray[np.float64],
    hidden: tuple[int, ...],
    seed: int,
) -> Any:
    model: Any
    if hidden:
        # Its penalty is alpha / n, where that of the regression is 1 / (C n).
        model = MLPClassifier(
            hidden,
            solver="lbfgs",
            alpha=1 / C,
            max_iter=_MAX_ITER["perceptron"],
            random_state=seed,
        )
    else:
        model = LogisticRegression(C=C, max_iter=_MAX_ITER["regression"])
    return model.fit(x, label, sample_weight=weight)
