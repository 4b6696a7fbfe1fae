"""Loss and score of outputs; early stopping watches those of the validation set."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import get_scorer
from torch import Tensor

from sktl._training.targets import Target

LOSS = "loss"


class OutputEvaluator:
    """Loss and score of outputs of a network.

    Parameters
    ----------
    scoring : str, callable or None
        As in `FineTunedCNNClassifier`.
    target : Target
        Kind of target.
    net : skorch.NeuralNet
        The net that computes the outputs; nothing is computed again.
    """

    def __init__(self, scoring: Any, target: Target, net: Any) -> None:
        self._scoring, self._target, self._net = scoring, target, net

    def loss(
        self, outputs: Tensor, y: NDArray[Any], sample_weight: NDArray[np.float64]
    ) -> float:
        """Return the mean loss of outputs ``(n, n_outputs)``."""
        # On the device, where the class weights of a loss are.
        outputs = outputs.to(self._net.device)
        weight = torch.from_numpy(sample_weight).float().to(outputs.device)
        target = torch.from_numpy(y).to(outputs.device), weight
        loss: Tensor = self._net.criterion_(outputs, target)
        return loss.item()

    def score(
        self,
        outputs: NDArray[np.float32],
        y: NDArray[Any],
        sample_weight: NDArray[np.float64],
        loss: float,
    ) -> float:
        """Return the score of outputs, the higher the better.

        Parameters
        ----------
        outputs : ndarray of shape (n, n_outputs)
            Outputs for the images of the validation set.
        y : ndarray of shape (n, ...)
            Encoded targets.
        sample_weight : ndarray of shape (n,)
            Weights. A scorer gets them only if they are not all equal, since some
            metrics do not take them.
        loss : float
            The validation loss.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If the score is not a finite number.
        TypeError
            If the weights differ, and the scorer does not take them.
        """
        if self._scoring is None:
            return self._target.score(outputs, y, sample_weight)
        if self._scoring == LOSS:
            return -loss
        scorer = get_scorer(self._scoring)
        estimator = self._target.scoring_net(self._net)
        rows = torch.from_numpy(outputs)
        # Methods of the estimator get positions in place of images.
        estimator.forward_iter = lambda X, **options: [rows[torch.as_tensor(X)]]
        options = {}
        if (sample_weight != sample_weight[0]).any():
            options["sample_weight"] = sample_weight
        positions = np.arange(len(y))
        try:
            score = scorer(estimator, positions, self._target.labels(y), **options)
        except TypeError as error:
            if "sample_weight" not in str(error):
                raise
            raise TypeError(
                f"scoring={self._scoring!r} must take sample_weight, since the weights "
                f"of the validation set differ. Got: {error}. Use another scorer, or "
                "fit without sample_weight and class_weight."
            ) from error
        if not (isinstance(score, int | float | np.number) and math.isfinite(score)):
            raise ValueError(
                f"scoring={self._scoring!r} must return a finite number for the "
                f"validation set. Got {score!r}. Use another scorer or a larger "
                "validation set."
            )
        return float(score)
