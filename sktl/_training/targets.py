"""Targets: the interface of a kind of target, and the split into train and valid.

A kind of target is a module of its own with a class that implements `Target`:
`sktl._training.multiclass` for one class per image, `sktl._training.multilabel` for
several labels, and `sktl._training.regression` for numbers. The trainer, the
checkpoint and the saved file use the interface only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import check_consistent_length
from torch import nn

from sktl._training.group_splits import groups_to_hold_out
from sktl._utils.sklearn_compat import check_sample_weight


class Target(Protocol):
    """One kind of target: encoding, loss, score, initial head, decoding, saving.

    The targets of a fit are encoded by a function of the module, which returns
    `EncodedTargets`, since every kind has its own parameters there. Settings of the
    loss are attributes of the target, and are not saved.
    """

    @property
    def n_outputs(self) -> int:
        """Number of outputs of the network."""

    @property
    def prefers_probe(self) -> bool:
        """Whether the linear probe is kept unless a training is clearly better."""

    @property
    def output_lr_factor(self) -> float:
        """Factor of the learning rate of the last layer of the head."""

    def loss(self) -> nn.Module:
        """Return the loss: ``(outputs, (y, sample_weight))`` to a scalar."""

    def score(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> float:
        """Return the validation score, the higher the better."""

    def encode(self, y: Any, name: str, estimator: BaseEstimator) -> NDArray[Any]:
        """Validate and encode further targets, such as those of a validation set.

        Errors name the argument `name` of the estimator, and the row.
        """

    def calibrated_losses(
        self, outputs: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the losses of held-out images that settings are compared by."""

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
        """Set the weights of a head to those of a linear probe on the features.

        No fold of a cross-validation divides a group.
        """

    def check_unchanged(self, previous: "Target", caller: str) -> None:
        """Raise a ValueError if a fitted model has another target than this one."""

    def is_complete(self, y: NDArray[Any]) -> bool:
        """Return whether a linear probe can be fitted on these encoded targets."""

    def strata(self, y: NDArray[Any]) -> NDArray[Any] | None:
        """Return the label of each sample to stratify a split by, or None."""

    def decode(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the predictions for outputs of the network."""

    def labels(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return encoded targets as they were passed to `fit`."""

    def scoring_net(self, net: Any) -> Any:
        """Return a skorch net as scorers of scikit-learn expect an estimator."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the target in a checkpoint, whatever its dtype."""

    def to_document(self) -> dict[str, Any]:
        """Return the target as values that JSON can hold."""


class ClassificationTarget(Target, Protocol):
    """Kind of target of a classifier."""

    @property
    def classes(self) -> NDArray[Any]:
        """Attribute ``classes_`` of a classifier."""

    def probabilities(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the probabilities for logits, as ``predict_proba`` does."""

    def decision_values(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Return the scores for logits, as ``decision_function`` does."""


def check_same_kind(target: Target, previous: Target, caller: str) -> None:
    """Raise a ValueError if two targets are not of the same kind.

    Parameters
    ----------
    target, previous : Target
        Target of this fit and of the previous one.
    caller : str
        Named in the error.
    """
    kind, expected = (each.to_document()["kind"] for each in (target, previous))
    if kind != expected:
        raise ValueError(
            f"{caller} must get targets of the kind of the first fit, which is "
            f"{expected}. Got {kind} targets. Call fit with warm_start=False."
        )


def check_n_columns(y: NDArray[Any], target: Target, name: str) -> None:
    """Raise a ValueError if further targets have other columns than the first ones.

    Parameters
    ----------
    y : ndarray of shape (n, n_columns)
        Further targets, named in the error by `name`.
    target : Target
        Target of the fit, with an output for each column.
    name : str
        Such as ``"y_val"``.
    """
    if y.shape[1] != target.n_outputs:
        raise ValueError(
            f"{name} must have as many columns as y, {target.n_outputs}. Got "
            f"{y.shape[1]}."
        )


@dataclass(frozen=True, eq=False)
class EncodedTargets:
    """Targets and weights of the samples whose weight is positive.

    Attributes
    ----------
    target : Target
        Kind of target.
    rows : ndarray of shape (n,), int
        Positions of the samples in X.
    y : ndarray of shape (n, ...)
        Encoded target of each sample.
    sample_weight : ndarray of shape (n,), float64
        Product of the sample weight and the class weight.
    groups : ndarray of shape (n,), int, or None
        Group of each sample; no split divides a group. None: each is one of its own.
    class_weight : ndarray of shape (n_classes,), float64, or None
        The class weights. None: there are none, or the target has them.
    validation : ndarray of shape (n,), bool, or None
        Mask of the validation set that was passed to `fit`. None: none was.
    """

    target: Target
    rows: NDArray[np.intp]
    y: NDArray[Any]
    sample_weight: NDArray[np.float64]
    groups: NDArray[np.intp] | None = None
    class_weight: NDArray[np.float64] | None = None
    validation: NDArray[np.bool_] | None = None

    def with_normalized_weights(self) -> Self:
        """Return the same targets with weights of mean 1."""
        weight = self.sample_weight
        return replace(self, sample_weight=weight / weight.mean())


def check_not_none(y: Any, estimator: BaseEstimator) -> None:
    """Raise a ValueError if there are no targets."""
    if y is None:
        raise ValueError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is "
            "None."
        )


def positive_weights(
    n_samples: int, y: NDArray[Any], sample_weight: Any
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the samples whose weight is positive, and their weights.

    Parameters
    ----------
    n_samples : int
        Number of images.
    y : ndarray of shape (n_samples, ...)
        Validated targets.
    sample_weight : array-like of shape (n_samples,) or None
        Weights of the samples. None: 1 for each.

    Returns
    -------
    rows : ndarray of shape (n,), int
        Positions of the samples.
    weight : ndarray of shape (n,), float64
        Their weights.

    Raises
    ------
    ValueError
        If lengths differ, a weight is negative, or all are 0.
    """
    check_consistent_length(range(n_samples), y)
    weight: NDArray[np.float64] = check_sample_weight(
        sample_weight, y, dtype=np.float64, ensure_non_negative=True
    )
    if not weight.any():
        raise ValueError(
            "Sample weights must contain at least one non-zero number. Got zeros only."
        )
    rows = np.flatnonzero(weight)
    return rows, weight[rows]


def validation_mask(
    targets: EncodedTargets, validation_fraction: float | None, seed: int
) -> NDArray[np.bool_]:
    """Select the validation set: the one passed to `fit`, or a part of X.

    The part is stratified by class if each image has one.

    Parameters
    ----------
    targets : EncodedTargets
        Targets of all samples.
    validation_fraction : float or None
        Fraction of the samples to hold out. None: no validation set.
    seed : int
        Seed of the split.

    Returns
    -------
    ndarray of shape (n,), bool
        True for held-out samples.

    Raises
    ------
    ValueError
        If a stratified split is impossible.
    """
    if targets.validation is not None:
        return targets.validation
    if validation_fraction is None:
        return np.zeros(len(targets.rows), dtype=bool)
    got = f"Got validation_fraction={validation_fraction!r}"
    try:
        held_out = _stratified_mask(targets, validation_fraction, seed)
        if held_out is None:
            raise ValueError(
                "Whole groups, of at least two classes if there are classes, must be "
                "held out, and others of the same classes must be left."
            )
    except ValueError as error:
        raise ValueError(
            "early_stopping holds out a validation set, stratified by class, which "
            f"must be possible. {got} of {len(targets.rows)} images: {error} Change "
            "validation_fraction, pass X_val and y_val, or set early_stopping=False."
        ) from error
    strata = targets.target.strata(targets.y)
    if strata is not None:
        missing = np.setdiff1d(strata[held_out], strata[~held_out])
        if len(missing):
            raise ValueError(
                f"Images of each class must be left to train on. {got}, which holds "
                f"out all images of {missing.tolist()}. Reduce validation_fraction."
            )
    return held_out


def selection_mask(
    targets: EncodedTargets, n_held_out: int, seed: int
) -> NDArray[np.bool_] | None:
    """Hold out samples to compare settings on, stratified by class if there is one.

    Parameters
    ----------
    targets : EncodedTargets
        Targets of all samples.
    n_held_out : int
        Number of samples to hold out; at least one per class and two in all, at most
        half.
    seed : int
        Seed of the split.

    Returns
    -------
    ndarray of shape (n,), bool, or None
        True for held-out samples. None if a class has only one sample, if there are
        less than four samples, or if no groups, of at least two classes if there are
        classes, can be held out.
    """
    positive = targets.sample_weight > 0
    n_samples, n_least = int(positive.sum()), 2
    strata = targets.target.strata(targets.y[positive])
    if strata is not None:
        counts = np.unique(strata, return_counts=True)[1]
        if counts.min() < 2:
            return None
        n_least = len(counts)
    # At most half, so that each class has a sample in the other part.
    n_held_out = min(max(n_held_out, n_least), n_samples // 2)
    if n_held_out < n_least:
        return None
    return _stratified_mask(targets, n_held_out, seed)


def _stratified_mask(
    targets: EncodedTargets, test_size: float, seed: int
) -> NDArray[np.bool_] | None:
    """Return the mask of a random part of the samples of positive weight.

    With groups, of whole groups; None if that is impossible.
    """
    # Samples of weight 0, by a class weight of 0, can be compared on nothing.
    rows = np.flatnonzero(targets.sample_weight)
    strata = targets.target.strata(targets.y[rows])
    if targets.groups is not None:
        n_held_out = test_size * len(rows) if test_size < 1 else test_size
        names = groups_to_hold_out(targets.groups[rows], strata, n_held_out, seed)
        if names is None:
            return None
        chosen = rows[np.isin(targets.groups[rows], names)]
    else:
        _, chosen = train_test_split(
            rows, test_size=test_size, stratify=strata, random_state=seed
        )
    held_out = np.zeros(len(targets.rows), dtype=bool)
    held_out[chosen] = True
    return held_out
