"""Splits that keep groups of images together, such as those of one patient.

Images of one group are more alike than others. If they are on both sides of a split,
the score on the held-out side is too high.
"""

import warnings
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from sktl._utils.labels import is_missing


def encode_groups(groups: Any, n_samples: int) -> NDArray[np.intp]:
    """Validate groups and number them in the order of their appearance.

    Parameters
    ----------
    groups : array-like of shape (n_samples,)
        Names or numbers of groups.
    n_samples : int
        Number of images.

    Returns
    -------
    ndarray of shape (n_samples,), int

    Raises
    ------
    ValueError
        If they are not a column of names or numbers, of the right length, or if one is
        missing.
    """
    shape = getattr(groups, "shape", None)
    if shape is None:
        shape = (len(groups),) if hasattr(groups, "__len__") else ()
    if tuple(shape) != (n_samples,):
        raise ValueError(
            f"groups must have one group for each image of X: shape ({n_samples},). "
            f"Got shape {shape}."
        )
    labels = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    numbers: dict[Any, int] = {}
    for index, label in enumerate(labels):
        if is_missing(label) or not isinstance(label, Hashable):
            raise ValueError(
                f"groups must contain names or numbers. Got groups[{index}]={label!r}. "
                "Give an image that belongs to no group one of its own."
            )
        numbers.setdefault(label, len(numbers))
    return np.array([numbers[label] for label in labels], dtype=np.intp)


def groups_to_hold_out(
    groups: NDArray[np.intp],
    strata: NDArray[Any] | None,
    n_held_out: float,
    seed: int,
) -> NDArray[np.intp] | None:
    """Return whole groups with about a number of images, in about equal parts by class.

    Parameters
    ----------
    groups : ndarray of shape (n,), int
        Group of each image.
    strata : ndarray of shape (n,) or None
        Class of each image. None: all images are alike.
    n_held_out : float
        Number of images to hold out, at least one group.
    seed : int
        Seed of the order in which groups are considered.

    Returns
    -------
    ndarray of int, or None
        The groups that are held out. A class with one group is not among them, since
        images of each class are left to train on. None if there are no such groups of
        at least two classes.
    """
    names, group = np.unique(groups, return_inverse=True)
    if strata is None:
        strata = np.zeros(len(groups))
    labels, stratum = np.unique(strata, return_inverse=True)
    counts = np.zeros((len(names), len(labels)))  # images of each group and class
    np.add.at(counts, (group, stratum), 1)
    n_images = counts.sum(axis=0)
    held, is_chosen = np.zeros(len(labels)), np.zeros(len(names), dtype=bool)

    def distance(number: int) -> float:
        """Return how far from the aim the held-out set is with one more group."""
        fractions = (held + counts[number]) / n_images
        return float(np.square(fractions - n_held_out / len(groups)).sum())

    def may_be_held_out(number: int) -> bool:
        others_are_left = (held + counts[number] < n_images).all()
        return bool(others_are_left and not is_chosen[number])

    order = np.random.default_rng(seed).permutation(len(names))
    for number in order:
        if may_be_held_out(number):
            without = np.square(held / n_images - n_held_out / len(groups)).sum()
            if distance(number) < without:
                is_chosen[number] = True
                held += counts[number]
    for label in np.flatnonzero(held == 0):  # its groups are larger than the aim
        with_label = order[counts[order, label] > 0]
        others = [number for number in with_label if may_be_held_out(number)]
        if not held[label] and others:
            nearest = min(others, key=distance)
            is_chosen[nearest] = True
            held += counts[nearest]
    if (held > 0).sum() < min(2, len(labels)):
        return None
    return names[is_chosen]


def grouped_folds(
    y: NDArray[np.intp] | None, groups: NDArray[np.intp], *, n_folds: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield the folds of a cross-validation, stratified by class.

    Parameters
    ----------
    y : ndarray of shape (n,), int, or None
        Class of each image. None: all images are alike.
    groups : ndarray of shape (n,), int
        Group of each image.
    n_folds : int
        Number of folds, if there are as many groups.
    seed : int
        Seed of the folds.

    Yields
    ------
    train, valid : ndarray of int
        Positions. Each class occurs in `train`; other folds are left out.
    """
    if y is None:
        y = np.zeros(len(groups), dtype=np.intp)
    n_folds = min(n_folds, len(np.unique(groups)), int(np.bincount(y).max()))
    if n_folds < 2:
        return
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with few images is not in each fold.
        warnings.filterwarnings("ignore", "The least populated class")
        folds = list(splitter.split(y, y, groups))
    for train, valid in folds:
        if len(np.unique(y[train])) == len(np.unique(y)):
            yield train, valid
