"""Validation set that the user passes to `fit`, in place of a held-out part."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from sktl._training.targets import EncodedTargets
from sktl._utils.sklearn_compat import check_sample_weight

NAMES = ("X_val", "y_val", "sample_weight_val")


def has_validation_set(
    X: Any, y: Any, sample_weight: Any, *, early_stopping: bool
) -> bool:
    """Return whether a validation set is passed; raise a ValueError if it is useless.

    Parameters
    ----------
    X, y, sample_weight
        Arguments `X_val`, `y_val` and `sample_weight_val` of `fit`.
    early_stopping : bool
        Whether a validation set is used.

    Returns
    -------
    bool

    Raises
    ------
    ValueError
        If a part of it is missing, or without early stopping.
    """
    is_given = [part is not None for part in (X, y, sample_weight)]
    if not any(is_given):
        return False
    given = ", ".join(n for n, there in zip(NAMES, is_given, strict=True) if there)
    if not (is_given[0] and is_given[1]):
        raise ValueError(
            f"X_val and y_val must be passed to fit together. Got {given}. Pass the "
            "images and the targets of the validation set, or neither."
        )
    if not early_stopping:
        raise ValueError(
            f"A validation set is used by early stopping only. Got {given} with "
            "early_stopping=False. Set early_stopping=True, or leave out the "
            "validation set."
        )
    return True


def append_validation_set(
    targets: EncodedTargets,
    n_train: int,
    n_valid: int,
    y: Any,
    sample_weight: Any,
    estimator: BaseEstimator,
) -> EncodedTargets:
    """Return targets with those of a validation set at the end.

    Parameters
    ----------
    targets : EncodedTargets
        Targets of X, with weights of mean 1.
    n_train, n_valid : int
        Number of images of X and of the validation set.
    y, sample_weight
        Arguments `y_val` and `sample_weight_val` of `fit`.
    estimator : BaseEstimator
        Named in errors.

    Returns
    -------
    EncodedTargets
        Rows from `n_train` on are those of the validation set. Its weights have the
        mean 1, too.

    Raises
    ------
    ValueError
        If `y` or `sample_weight` is invalid, or all weights are 0.
    """
    with errors_of("y_val"):
        encoded = targets.target.encode(y, "y_val", estimator)
    if len(encoded) != n_valid:
        raise ValueError(
            f"y_val must have one target for each image of X_val. Got {len(encoded)} "
            f"targets and {n_valid} images."
        )
    with errors_of("sample_weight_val"):
        weight = check_sample_weight(
            sample_weight, encoded, dtype=np.float64, ensure_non_negative=True
        )
    rows = np.flatnonzero(weight)  # images of weight 0 are not read
    encoded, weight = encoded[rows], weight[rows]
    if targets.class_weight is not None:
        weight = weight * targets.class_weight[encoded]
    if not weight.any():
        raise ValueError(
            "The validation set must have an image of positive weight. Got only "
            "weights of 0 by sample_weight_val and class_weight."
        )
    groups = targets.groups
    if groups is not None:  # no split divides the validation set
        groups = np.concatenate([groups, np.full(len(rows), -1)])
    return replace(
        targets,
        rows=np.concatenate([targets.rows, n_train + rows]),
        y=np.concatenate([targets.y, encoded]),
        sample_weight=np.concatenate([targets.sample_weight, weight / weight.mean()]),
        groups=groups,
        validation=np.repeat([False, True], [len(targets.rows), len(rows)]),
    )


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Name an argument in errors that are raised inside and name `X` or `y`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if name in str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} is invalid: {error}") from error
