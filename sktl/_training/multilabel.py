"""Multilabel targets: any number of several labels per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from sktl._training.multiclass import losses_at_best_temperature
from sktl._training.multilabel_probe import fit_multilabel_probe
from sktl._training.scoring_net import ClassifierNet
from sktl._training.targets import (
    EncodedTargets,
    Target,
    check_n_columns,
    check_same_kind,
    positive_weights,
)
from sktl._utils.indicators import check_indicator_matrix, has_several_columns
from sktl._utils.json_values import get_value, require

_MAX_LABELS = 2**20  # in a file


class WeightedBinaryCrossEntropy(nn.Module):
    """Mean over a batch and its labels of the weighted binary cross-entropies.

    Parameters
    ----------
    class_weights : ndarray of shape (n_labels, 2)
        Weights of 0 and 1 for each label.
    label_smoothing : float, default=0.0
        Fraction of the target distribution that is spread evenly over 0 and 1.
    """

    class_weights: Tensor

    def __init__(
        self, class_weights: NDArray[np.float64], label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        weights = torch.from_numpy(class_weights.astype(np.float32))
        self.register_buffer("class_weights", weights)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of logits and targets ``(n, n_labels)``, and weights."""
        y, sample_weight = target
        logits, y = logits.float(), y.float()  # also of a network in bfloat16
        absent, present = self.class_weights.unbind(dim=1)  # (n_labels,) each
        smooth = y * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        losses = losses * torch.where(y > 0.5, present, absent)  # (n, n_labels)
        return (losses.mean(dim=1) * sample_weight).mean()


@dataclass(frozen=True, eq=False)
class MultilabelTarget:
    """Target of several labels; implements `sktl._training.targets.Target`.

    An encoded target is a row of the indicator matrix.

    Attributes
    ----------
    class_weights : ndarray of shape (n_labels, 2)
        Weights of 0 and 1 for each label.
    label_smoothing : float, default=0.0
        As in `FineTunedCNNClassifier`.
    """

    class_weights: NDArray[np.float64]
    label_smoothing: float = 0.0

    prefers_probe = False  # as with one label per image
    # A step of an optimizer changes both logits of two classes, by the same amount in
    # opposite directions, and so their difference by twice as much as one logit.
    output_lr_factor = 2.0

    @property
    def n_outputs(self) -> int:
        """Number of labels."""
        return len(self.class_weights)

    @property
    def classes(self) -> NDArray[np.int64]:
        """Positions of the labels, as in scikit-learn's perceptron."""
        return np.arange(self.n_outputs)

    def encode(self, y: Any, name: str, estimator: BaseEstimator) -> NDArray[np.uint8]:
        """Validate a further indicator matrix, named in errors by `name`."""
        if not has_several_columns(y):
            raise ValueError(f"{name} must be an indicator matrix, as y.")
        matrix = check_indicator_matrix(y, estimator, name)
        check_n_columns(matrix, self, name)
        return matrix

    def loss(self) -> nn.Module:
        """Return the weighted binary cross-entropy."""
        return WeightedBinaryCrossEntropy(self.class_weights, self.label_smoothing)

    def score(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> float:
        """Return the weighted accuracy, averaged over the labels."""
        weight = self._weights(y) * sample_weight[:, None]
        if not weight.any():
            return 0.0
        return float(np.average((outputs > 0) == (y > 0), weights=weight))

    def _weights(self, y: NDArray[Any]) -> NDArray[np.float64]:
        """Return the class weight of each element of an indicator matrix."""
        absent, present = self.class_weights.T
        weights: NDArray[np.float64] = np.where(y > 0, present, absent)
        return weights

    def calibrated_losses(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the weighted log losses at the temperature with the least mean.

        It is the same for all labels; see `MulticlassTarget.calibrated_losses`.
        """
        weight = self._weights(y) * (sample_weight / sample_weight.mean())[:, None]

        def losses(logits: NDArray[np.float64]) -> NDArray[np.float64]:
            elements = np.logaddexp(0, logits) - logits * y  # (n, n_labels)
            mean: NDArray[np.float64] = (elements * weight).mean(axis=1)
            return mean

        return losses_at_best_temperature(losses, outputs)

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
        """Set the weights of the head to those of one logistic regression per label."""
        fit_multilabel_probe(
            head,
            features,
            y,
            sample_weight,
            self.class_weights,
            groups=groups,
            hidden_layer_sizes=hidden_layer_sizes,
            seed=seed,
        )

    def check_unchanged(self, previous: Target, caller: str) -> None:
        """Raise a ValueError if a previous fit had another number of labels."""
        check_same_kind(self, previous, caller)
        if self.n_outputs != previous.n_outputs:
            raise ValueError(
                f"{caller} must get as many labels as the first fit, which had "
                f"{previous.n_outputs} columns. Got {self.n_outputs}."
            )

    def is_complete(self, y: NDArray[Any]) -> bool:
        """Return True: a label that never occurs gets a constant."""
        return True

    def strata(self, y: NDArray[Any]) -> None:
        """Return None: a split is random."""

    def decode(self, outputs: NDArray[Any]) -> NDArray[np.int64]:
        """Return the indicator matrix of the labels of a probability above 0.5."""
        return (outputs > 0).astype(np.int64)

    def probabilities(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the probability of each label ``(n_samples, n_labels)``."""
        proba: NDArray[Any] = expit(outputs)
        return proba

    def decision_values(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the logits."""
        return outputs

    def labels(self, y: NDArray[Any]) -> NDArray[np.int64]:
        """Return the indicator matrix."""
        return y.astype(np.int64)

    def scoring_net(self, net: Any) -> ClassifierNet:
        """Return a view of the net that predicts labels and probabilities."""
        return ClassifierNet(net, self)

    def fingerprint(self) -> dict[str, Any]:
        """Return the number of labels."""
        return {"n_labels": self.n_outputs}

    def to_document(self) -> dict[str, Any]:
        """Return the number of labels as values that JSON can hold."""
        return {"kind": "multilabel", "n_outputs": self.n_outputs}


def multilabel_from_document(document: dict[str, Any]) -> MultilabelTarget:
    """Return the target that `MultilabelTarget.to_document` describes.

    Parameters
    ----------
    document : dict
        From a file; anything may be in it.

    Returns
    -------
    MultilabelTarget

    Raises
    ------
    ValueError
        If it is not such a description.
    """
    n_labels = get_value(document, "n_outputs", int)
    require(1 < n_labels <= _MAX_LABELS, "its number of labels is invalid")
    return MultilabelTarget(np.ones((n_labels, 2)))


def encode_multilabel(
    n_samples: int,
    y: Any,
    sample_weight: Any,
    *,
    class_weight: Any,
    label_smoothing: float = 0.0,
    classes: Any = None,
    estimator: BaseEstimator,
) -> EncodedTargets:
    """Validate and encode an indicator matrix and weights.

    Parameters
    ----------
    n_samples : int
        Number of images.
    y : array-like or sparse matrix of shape (n_samples, n_labels)
        Indicator matrix.
    sample_weight : array-like of shape (n_samples,) or None
        Weights of the samples. None: 1 for each.
    class_weight : dict, list of dict, "balanced" or None
        Weights of 0 and 1: for all labels, or for each.
    label_smoothing : float, default=0.0
        As in `FineTunedCNNClassifier`.
    classes : sequence of length n_labels or None
        Labels of all columns; only their number is used.
    estimator : BaseEstimator
        Named in errors.

    Returns
    -------
    EncodedTargets
        Of the samples whose weight is not 0.

    Raises
    ------
    ValueError
        If an element of `y` is not 0 or 1, lengths differ, all weights are 0, a class
        weight is invalid, or `classes` has another length.
    """
    matrix = check_indicator_matrix(y, estimator)
    rows, weight = positive_weights(n_samples, matrix, sample_weight)
    matrix = matrix[rows]
    if classes is not None and len(classes) != matrix.shape[1]:
        raise ValueError(
            "classes must have one element for each column of y. Got "
            f"{len(classes)} for {matrix.shape[1]} columns."
        )
    class_weights = _class_weights(class_weight, matrix, weight)
    return EncodedTargets(
        MultilabelTarget(class_weights, label_smoothing), rows, matrix, weight
    )


def _class_weights(
    class_weight: Any, y: NDArray[np.uint8], sample_weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weights of 0 and 1 for each label ``(n_labels, 2)``."""
    n_labels = y.shape[1]
    each = class_weight
    if not isinstance(class_weight, list | tuple):
        each = [class_weight] * n_labels
    elif len(class_weight) != n_labels:
        raise ValueError(
            "class_weight must have one dict for each column of y. Got "
            f"{len(class_weight)} for {n_labels} columns."
        )
    weights = np.ones((n_labels, 2))
    for label, column, row in zip(each, y.T, weights, strict=True):
        if isinstance(label, Mapping):
            unknown = set(label) - {0, 1}
            if unknown:
                raise ValueError(
                    "class_weight must have weights of 0 and 1, since y has several "
                    f"columns. Got {sorted(map(str, unknown))} in {class_weight!r}."
                )
            row[:] = [label.get(0, 1), label.get(1, 1)]
        elif column.any() and not column.all():  # else nothing can be balanced
            row[:] = compute_class_weight(
                label, classes=np.arange(2), y=column, sample_weight=sample_weight
            )
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.any()):
        raise ValueError(
            "class_weight must be finite and not negative, and positive for a class. "
            f"Got {class_weight!r}."
        )
    return weights
