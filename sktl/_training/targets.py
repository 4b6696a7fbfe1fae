"""What is learned from: classes, the label of each image, and how much it counts."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import check_consistent_length
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from sktl._images.sequence import ImageSequence
from sktl._utils.sklearn_compat import check_sample_weight, check_y


@dataclass(frozen=True, eq=False)
class EncodedTargets:
    """Images that count, with what they are.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        Sorted.
    rows : ndarray of shape (n,), int
        Their positions in X. Samples of weight 0 are left out.
    label : ndarray of shape (n,), int
        Positions in `classes`.
    weight : ndarray of shape (n,), float64
        How much each counts, of the sample and of its class together.
    """

    classes: NDArray[Any]
    rows: NDArray[np.intp]
    label: NDArray[np.intp]
    weight: NDArray[np.float64]

    def rescaled(self) -> "EncodedTargets":
        """Give the same with weights whose mean is 1."""
        return replace(self, weight=self.weight / self.weight.mean())


def encode_targets(
    images: ImageSequence,
    y: Any,
    sample_weight: Any,
    *,
    class_weight: Any,
    classes: Any = None,
    estimator: BaseEstimator,
) -> EncodedTargets:
    """Check labels and weights.

    Parameters
    ----------
    images : ImageSequence
        What they are for.
    y : array-like of shape (n_samples,)
        Labels: str, int or bool.
    sample_weight : array-like of shape (n_samples,) or None
        None is 1 for each.
    class_weight : dict, "balanced" or None
        As everywhere in scikit-learn.
    classes : array-like of shape (n_classes,) or None
        The classes there are. None: those of `y`, of which there must be two.
    estimator : BaseEstimator
        On behalf of which they are checked.

    Returns
    -------
    EncodedTargets
        The images whose weight is not 0.

    Raises
    ------
    ValueError
        If `y` is no classification target, lengths differ, every weight is 0, one of
        a class is negative, or there are fewer than two classes, or others than in
        `classes`.
    """
    name = type(estimator).__name__
    if y is None:
        raise ValueError(f"{name} requires y to be passed, but the target y is None.")
    y = check_y(y, estimator=estimator)
    check_classification_targets(y)
    check_consistent_length(images, y)
    weight = check_sample_weight(
        sample_weight, y, dtype=np.float64, ensure_non_negative=True
    )
    if not weight.any():
        raise ValueError(
            "Sample weights must contain at least one non-zero number. Got zeros only."
        )
    rows = np.flatnonzero(weight)
    y, weight = y[rows], weight[rows]
    present = np.unique(y)
    if classes is None:
        classes = present
    classes = np.unique(np.asarray(classes))
    if len(classes) < 2:
        raise ValueError(
            f"{name} needs images of at least two classes. Got one class: "
            f"{classes.tolist()}."
        )
    if not np.isin(present, classes).all():
        raise ValueError(
            f"y must have labels of the classes {classes.tolist()} only. Got "
            f"{np.setdiff1d(present, classes).tolist()} as well."
        )
    label = np.searchsorted(classes, y)
    of_class = compute_class_weight(
        class_weight, classes=classes, y=y, sample_weight=weight
    )
    weight = weight * of_class[label]
    if not (np.isfinite(of_class).all() and of_class.min() >= 0 and weight.any()):
        raise ValueError(
            "class_weight must not be negative nor infinite, and positive for a class "
            f"in y. Got {class_weight!r}."
        )
    return EncodedTargets(classes, rows, label, weight)


def validation_mask(
    given: EncodedTargets, fraction: float | None, seed: int
) -> NDArray[np.bool_]:
    """Choose a stratified part to watch a training by.

    Parameters
    ----------
    given : EncodedTargets
        All that is given.
    fraction : float or None
        Size of the part. None: nothing.
    seed : int
        Decides which.

    Returns
    -------
    ndarray of shape (n,), bool
        A mask over `given.rows`.

    Raises
    ------
    ValueError
        If there are too few of a class to divide them.
    """
    held_out = np.zeros(len(given.rows), dtype=bool)
    if fraction is not None:
        try:
            _, chosen = train_test_split(
                np.arange(len(given.rows)),
                test_size=fraction,
                stratify=given.label,
                random_state=seed,
            )
        except ValueError as error:
            raise ValueError(
                "early_stopping holds out a stratified part of the images, which "
                f"must be possible. Got validation_fraction={fraction!r} of "
                f"{len(given.rows)}: {error} Change it, or early_stopping."
            ) from error
        held_out[chosen] = True
        left = np.isin(given.label, given.label[~held_out])
        if not left.all():
            gone = given.classes[np.unique(given.label[~left])]
            raise ValueError(
                "Images of each class must be left to learn from. Got "
                f"validation_fraction={fraction!r}, which holds out all of "
                f"{gone.tolist()}."
            )
    return held_out
