"""Multiclass targets: one class per image, of any label type."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from sktl._training.linear_probe import fit_linear_probe
from sktl._training.scoring_net import ClassifierNet
from sktl._training.targets import (
    EncodedTargets,
    Target,
    check_not_none,
    check_same_kind,
    positive_weights,
)
from sktl._utils.labels import check_labels, labels_from_json, labels_to_json

_LOG_TEMPERATURES = (-2.0, 4.0)  # temperatures from 0.14 to 55


class WeightedCrossEntropy(nn.Module):
    """Mean over a batch of the cross-entropies times the sample weights.

    Parameters
    ----------
    label_smoothing : float, default=0.0
        Fraction of the target distribution that is spread evenly over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of logits ``(n, n_classes)`` for targets and weights."""
        y, sample_weight = target
        losses = F.cross_entropy(
            logits, y, reduction="none", label_smoothing=self.label_smoothing
        )
        return (losses * sample_weight).mean()


def losses_at_best_temperature(
    losses: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    outputs: NDArray[Any],
) -> NDArray[np.float64]:
    """Return losses of logits that are divided by the temperature of the least mean.

    Parameters
    ----------
    losses : callable
        Returns the loss of each image for logits.
    outputs : ndarray of shape (n, n_outputs)
        The logits.

    Returns
    -------
    ndarray of shape (n,)
    """

    def losses_at(log_temperature: float) -> NDArray[np.float64]:
        return losses(outputs.astype(np.float64) / np.exp(log_temperature))

    best = minimize_scalar(lambda t: losses_at(t).mean(), bounds=_LOG_TEMPERATURES)
    return losses_at(best.x)


@dataclass(frozen=True, eq=False)
class MulticlassTarget:
    """Target with one class per image; implements `sktl._training.targets.Target`.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        Labels, sorted. An encoded target is a position in it.
    label_smoothing : float, default=0.0
        As in `FineTunedCNNClassifier`.
    """

    classes: NDArray[Any]
    label_smoothing: float = 0.0

    prefers_probe = False  # a short training is better on most data
    output_lr_factor = 1.0

    @property
    def n_outputs(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def loss(self) -> nn.Module:
        """Return the weighted cross-entropy."""
        return WeightedCrossEntropy(self.label_smoothing)

    def score(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> float:
        """Return the weighted accuracy of logits ``(n, n_classes)``."""
        return float(np.average(outputs.argmax(axis=1) == y, weights=sample_weight))

    def encode(self, y: Any, name: str, estimator: BaseEstimator) -> NDArray[np.intp]:
        """Return the position of each label among the classes."""
        labels: list[Any] = check_labels(y, estimator, name).tolist()
        # Not by comparing arrays, in which the int 1 equals the string "1".
        positions = {label: i for i, label in enumerate(self.classes.tolist())}
        for index, label in enumerate(labels):
            if label not in positions:
                raise ValueError(
                    f"{name}[{index}] is {label!r}, which is none of the classes of y: "
                    f"{self.classes.tolist()}. Remove it and its image."
                )
        return np.array([positions[label] for label in labels], dtype=np.intp)

    def calibrated_losses(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the weighted log losses at the temperature with the least mean.

        Training makes a network too certain even while its predictions get better, so
        that its log loss rises. A temperature corrects that and changes no prediction
        (Guo et al., *On Calibration of Modern Neural Networks*, 2017).
        """
        weight = sample_weight / sample_weight.mean()

        def losses(logits: NDArray[np.float64]) -> NDArray[np.float64]:
            log_proba: NDArray[np.float64] = log_softmax(logits, axis=1)
            return -log_proba[np.arange(len(y)), y] * weight

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
        """Set the weights of the head to those of a logistic regression."""
        fit_linear_probe(
            head,
            features,
            y,
            sample_weight,
            groups=groups,
            hidden_layer_sizes=hidden_layer_sizes,
            seed=seed,
        )

    def check_unchanged(self, previous: Target, caller: str) -> None:
        """Raise a ValueError if the classes differ from those of a previous fit."""
        check_same_kind(self, previous, caller)
        expected = cast(MulticlassTarget, previous).classes
        if not np.array_equal(self.classes, expected):
            raise ValueError(
                f"{caller} must get the classes of the first fit, {expected.tolist()}. "
                f"Got {self.classes.tolist()}."
            )

    def is_complete(self, y: NDArray[Any]) -> bool:
        """Return whether every class occurs."""
        return len(np.unique(y)) == len(self.classes)

    def strata(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return the labels."""
        return self.classes[y]

    def decode(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the most probable label of each row."""
        return self.classes[outputs.argmax(axis=1)]

    def probabilities(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the softmax of each row."""
        proba: NDArray[Any] = softmax(outputs, axis=1)
        return proba

    def decision_values(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the logits; of two classes, the log-odds of the second."""
        return outputs[:, 1] - outputs[:, 0] if self.n_outputs == 2 else outputs

    def labels(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return the label of each encoded target."""
        return self.classes[y]

    def scoring_net(self, net: Any) -> ClassifierNet:
        """Return a view of the net that predicts labels and probabilities."""
        return ClassifierNet(net, self)

    def fingerprint(self) -> dict[str, Any]:
        """Return the text of the classes."""
        return {"classes": [str(label) for label in self.classes.tolist()]}

    def to_document(self) -> dict[str, Any]:
        """Return the classes as values that JSON can hold."""
        return {"kind": "multiclass", **labels_to_json(self.classes)}


def multiclass_from_document(document: dict[str, Any]) -> MulticlassTarget:
    """Return the target that `MulticlassTarget.to_document` describes.

    Parameters
    ----------
    document : dict
        From a file; anything may be in it.

    Returns
    -------
    MulticlassTarget

    Raises
    ------
    ValueError
        If it is not such a description.
    """
    return MulticlassTarget(labels_from_json(document))


def encode_multiclass(
    n_samples: int,
    y: Any,
    sample_weight: Any,
    *,
    class_weight: Any,
    label_smoothing: float = 0.0,
    classes: Any = None,
    estimator: BaseEstimator,
) -> EncodedTargets:
    """Validate and encode labels and weights.

    Parameters
    ----------
    n_samples : int
        Number of images.
    y : array-like of shape (n_samples,)
        Labels: str, int or bool.
    sample_weight : array-like of shape (n_samples,) or None
        Weights of the samples. None: 1 for each.
    class_weight : dict, "balanced" or None
        Weights of the classes, as in scikit-learn's classifiers.
    label_smoothing : float, default=0.0
        As in `FineTunedCNNClassifier`.
    classes : array-like of shape (n_classes,) or None
        All classes. None: those that occur in `y`.
    estimator : BaseEstimator
        Named in errors.

    Returns
    -------
    EncodedTargets
        Of the samples whose weight is not 0.

    Raises
    ------
    ValueError
        If a label is missing, `y` is not a classification target or lengths differ; if
        all weights are 0 or a class weight is negative; if there are fewer than two
        classes; or if `y` contains labels that are not in `classes`.
    """
    name = type(estimator).__name__
    check_not_none(y, estimator)
    y = check_labels(y, estimator)
    rows, weight = positive_weights(n_samples, y, sample_weight)
    y = y[rows]
    classes = _valid_classes(y, classes, name)
    encoded = np.searchsorted(classes, y)
    if isinstance(class_weight, list | tuple):
        raise ValueError(
            "class_weight must be a dict, 'balanced' or None if y has one label per "
            f"image. Got {class_weight!r}."
        )
    class_weights = compute_class_weight(
        class_weight, classes=classes, y=y, sample_weight=weight
    )
    weight = weight * class_weights[encoded]
    valid = np.isfinite(class_weights).all() and class_weights.min() >= 0
    if not (valid and weight.any()):
        raise ValueError(
            "class_weight must be finite and not negative, and positive for a class "
            f"in y. Got {class_weight!r}."
        )
    target = MulticlassTarget(classes, label_smoothing)
    return EncodedTargets(target, rows, encoded, weight, class_weight=class_weights)


def _valid_classes(y: NDArray[Any], classes: Any, name: str) -> NDArray[Any]:
    """Return the sorted classes; raise if `y` does not fit them."""
    present = np.unique(y)
    valid: NDArray[Any] = present if classes is None else np.unique(np.asarray(classes))
    if len(valid) < 2:
        raise ValueError(
            f"{name} needs images of at least two classes. Got one class: "
            f"{valid.tolist()}."
        )
    unknown = np.setdiff1d(present, valid)
    if len(unknown):
        raise ValueError(
            f"y must contain only the classes {valid.tolist()}. Got "
            f"{unknown.tolist()} as well."
        )
    return valid
