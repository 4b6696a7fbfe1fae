"""Tests of splits that keep groups together."""

from pathlib import Path

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from trainer_helpers import make_classifier, make_estimator

from sktl._training.group_splits import (
    encode_groups,
    grouped_folds,
    groups_to_hold_out,
)
from sktl._training.linear_probe import select_C


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["b", "a", "b"], [0, 1, 0]),
        (np.array([7, 7, 3]), [0, 0, 1]),
        ([np.int64(7), np.int64(3), 7], [0, 1, 0]),
        ([Path("film1"), Path("film2"), Path("film1")], [0, 1, 0]),
        ((1, "1", 1.0), [0, 1, 0]),
        (np.array(["x", "y", "x"], dtype=object), [0, 1, 0]),
    ],
)
def test_groups_are_numbered(groups, expected):
    assert encode_groups(groups, 3).tolist() == expected


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (["a", "b"], r"shape \(3,\). Got shape \(2,\)"),
        (7, r"shape \(3,\). Got shape \(\)"),
        (np.zeros((3, 1)), r"shape \(3,\). Got shape \(3, 1\)"),
        (["a", None, "b"], r"Got groups\[1\]=None"),
        ([0.0, 1.0, np.nan], r"Got groups\[2\]=nan"),
        ([["a"], ["b"], ["c"]], r"Got groups\[0\]=\['a'\]"),
    ],
)
def test_invalid_groups(groups, reason):
    with pytest.raises(ValueError, match=reason):
        encode_groups(groups, 3)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("size", [1, 5])
def test_held_out_groups_are_about_stratified(fraction, size):
    strata = np.repeat(["a", "b", "c"], [200, 100, 50])
    groups = np.arange(350) // size
    chosen = groups_to_hold_out(groups, strata, fraction * 350, 0)
    held_out = np.isin(groups, chosen)
    counts = [(strata[held_out] == label).sum() for label in "abc"]
    np.testing.assert_allclose(
        counts, [200 * fraction, 100 * fraction, 50 * fraction], atol=size / 2
    )
    again = groups_to_hold_out(groups, strata, fraction * 350, 0)
    np.testing.assert_array_equal(again, chosen)
    assert set(groups_to_hold_out(groups, strata, fraction * 350, 1)) != set(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_several_classes_and_sizes(seed):
    rng = np.random.default_rng(seed)
    groups = rng.choice(12, 300, p=np.arange(1, 13) / 78)
    strata = rng.integers(0, 3, 300)
    chosen = groups_to_hold_out(groups, strata, 60, seed)
    held_out = np.isin(groups, chosen)
    assert 40 <= held_out.sum() <= 80
    assert len(np.unique(strata[held_out])) == len(np.unique(strata[~held_out])) == 3


def test_large_groups_are_held_out_all_the_same():
    strata = np.repeat(["a", "b"], 100)
    groups = np.arange(200) // 50  # two of each class
    chosen = groups_to_hold_out(groups, strata, 20, 0)
    assert sorted(chosen // 2) == [0, 1]
    assert len(groups_to_hold_out(groups, None, 20, 0)) == 1


def test_class_of_one_group_is_not_held_out():
    strata = np.repeat(["a", "b", "c"], 20)
    groups = np.r_[np.arange(40) // 4, np.full(20, 10)]
    assert 10 not in groups_to_hold_out(groups, strata, 12, 0)
    groups = np.repeat([0, 1, 2], 20)
    assert groups_to_hold_out(groups, strata, 12, 0) is None
    assert groups_to_hold_out(np.zeros(60, int), None, 12, 0) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_groups", [2, 3, 8])
@pytest.mark.parametrize("with_classes", [True, False])
def test_folds_keep_groups_together(n_groups, with_classes):
    y = np.tile([0, 1], 24)
    groups = np.arange(48) // 2 % n_groups
    folds = list(grouped_folds(y if with_classes else None, groups, n_folds=5, seed=0))
    assert len(folds) == min(5, n_groups)
    for train, valid in folds:
        assert not set(groups[train]) & set(groups[valid])
        assert len(np.unique(y[train])) == 2
    assert sorted(np.concatenate([valid for _, valid in folds])) == list(range(48))


def test_folds_without_a_class_in_the_training_part_are_left_out():
    y, groups = np.repeat([0, 1], [20, 10]), np.r_[np.arange(20) % 4, np.full(10, 4)]
    folds = list(grouped_folds(y, groups, n_folds=5, seed=0))
    assert len(folds) == 4
    assert all(4 not in groups[valid] for _, valid in folds)
    assert list(grouped_folds(y, np.zeros(30, int), n_folds=5, seed=0)) == []


def make_patients(n_groups=12, size=6, target="one label"):
    """Return nearly equal images of each group, and targets by chance."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (n_groups, 16, 16, 3)).repeat(size, axis=0)
    images = (base + rng.integers(-4, 5, base.shape)).clip(0, 255).astype(np.uint8)
    y = rng.permutation(np.arange(n_groups) % 2)
    if target == "several labels":
        y = np.stack([y, rng.permutation(y)], axis=1)
    elif target == "numbers":
        y = rng.normal(5, 2, n_groups)
    return images, y.repeat(size, axis=0), np.arange(n_groups).repeat(size)


@pytest.mark.usefixtures("quick_linear_probe")
@pytest.mark.parametrize(
    ("target", "early_stopping"),
    [
        ("one label", True),
        ("numbers", True),
        pytest.param("several labels", True, marks=pytest.mark.slow),
        pytest.param("one label", False, marks=pytest.mark.slow),
        pytest.param("several labels", False, marks=pytest.mark.slow),
        pytest.param("numbers", False, marks=pytest.mark.slow),
    ],
)
def test_nearly_equal_images_do_not_fool_the_score(target, early_stopping):
    images, y, groups = make_patients(target=target)
    classifier = make_estimator(
        target,
        lr="auto",
        early_stopping=early_stopping,
        validation_fraction=0.3,
        max_epochs=2,
    )
    scores = []
    for more in ({}, {"groups": [f"patient {group}" for group in groups]}):
        classifier.fit(images, y, **more)
        scores.append(classifier.selection_[-1]["valid_score"])
        if early_stopping:
            scores[-1] = classifier.history_[classifier.best_epoch_]["valid_score"]
    assert scores[0] > 0.9
    assert scores[1] < 0.8


def test_regularization_of_the_probe_is_selected_on_other_groups():
    rng = np.random.default_rng(0)
    groups = np.arange(40).repeat(5)
    x = rng.normal(size=(40, 30)).repeat(5, axis=0) + rng.normal(0, 0.01, (200, 30))
    y = (np.arange(40) % 2).repeat(5)
    alone, together = (
        select_C(x, y, np.ones(200), each, (), 0) for each in (None, groups)
    )
    assert together < 0.01 < 1 < alone


@pytest.mark.usefixtures("quick_linear_probe")
def test_groups_are_routed_in_a_search():
    images, y, groups = make_patients()
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(
            make_classifier(max_epochs=1),
            {"early_stopping": [True]},
            cv=GroupKFold(2),
        ).fit(images, y, groups=groups)
    expected = clone(search.best_estimator_).fit(images, y, groups=groups)
    assert search.best_estimator_.history_ == expected.history_
    assert expected.history_ != expected.fit(images, y).history_


def test_checkpoint_belongs_to_the_groups(tmp_path):
    images, y, groups = make_patients()
    classifier = make_classifier(max_epochs=1, checkpoint=tmp_path, head_init="random")
    classifier.fit(images, y, groups=groups).fit(images, y, groups=groups + 7)
    with pytest.raises(ValueError, match="differs in groups"):
        classifier.fit(images, y, groups=groups // 2)
