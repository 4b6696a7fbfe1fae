"""The score on the validation set that early stopping watches."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import get_scorer

from sktl._training.targets import Target

LOSS = "loss"


def validation_score(
    scoring: Any,
    target: Target,
    net: Any,
    outputs: NDArray[np.float32],
    y: NDArray[Any],
    sample_weight: NDArray[np.float64],
    loss: float,
) -> float:
    """Return the score of outputs of a network, the higher the better.

    Parameters
    ----------
    scoring : str, callable or None
        As in `FineTunedCNNClassifier`.
    target : Target
        Kind of target.
    net : skorch.NeuralNet
        The net that computed the outputs; nothing is computed again.
    outputs : ndarray of shape (n, n_outputs)
        Outputs for the images of the validation set.
    y : ndarray of shape (n, ...)
        Encoded targets.
    sample_weight : ndarray of shape (n,)
        Weights. A scorer gets them only if they are not all equal, since some metrics
        do not support them.
    loss : float
        The validation loss.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the score is not a finite number.
    """
    if scoring is None:
        return target.score(outputs, y, sample_weight)
    if scoring == LOSS:
        return -loss
    scorer = get_scorer(scoring)
    estimator = target.scoring_net(net)
    rows = torch.from_numpy(outputs)
    # Methods of the estimator get positions in place of images.
    estimator.forward_iter = lambda X, **options: [rows[torch.as_tensor(X)]]
    options = {}
    if (sample_weight != sample_weight[0]).any():
        options["sample_weight"] = sample_weight
    score = scorer(estimator, np.arange(len(y)), target.labels(y), **options)
    if not (isinstance(score, int | float | np.number) and math.isfinite(score)):
        raise ValueError(
            f"scoring={scoring!r} must return a finite number for the validation set. "
            f"Got {score!r}. Use another scorer or a larger validation set."
        )
    return float(score)
