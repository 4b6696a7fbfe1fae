"""Tests of encoded targets and of the validation split."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from sktl._training.multiclass import encode_multiclass
from sktl._training.targets import EncodedTargets, selection_mask, validation_mask


def encode(y, sample_weight=None, class_weight=None):
    return encode_multiclass(
        len(y),
        y,
        sample_weight,
        class_weight=class_weight,
        estimator=LogisticRegression(),
    )


def test_normalized_weights_have_mean_1():
    targets = encode(["b", "a", "b"], [1, 2, 5])
    normalized = targets.with_normalized_weights()
    np.testing.assert_allclose(normalized.sample_weight, [3 / 8, 6 / 8, 15 / 8])
    np.testing.assert_array_equal(targets.sample_weight, [1, 2, 5])
    assert normalized.target is targets.target
    np.testing.assert_array_equal(normalized.y, targets.y)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_split_is_stratified_and_reproducible(fraction):
    y = np.repeat(["a", "b", "c"], [200, 80, 20])
    targets = encode(np.random.default_rng(0).permutation(y))
    held_out = validation_mask(targets, fraction, 3)
    expected = np.array([200, 80, 20]) * fraction
    np.testing.assert_array_equal(np.bincount(targets.y[held_out]), expected)
    np.testing.assert_array_equal(validation_mask(targets, fraction, 3), held_out)
    assert (validation_mask(targets, fraction, 4) != held_out).any()


def test_only_samples_of_positive_weight_are_held_out():
    targets = encode(["a", "b"] * 20, [0, 0, 1, 1] * 10)
    held_out = validation_mask(targets, 0.2, 0)
    assert held_out.shape == targets.rows.shape == (20,)
    assert held_out.sum() == 4
    assert not validation_mask(targets, None, 0).any()


@pytest.mark.parametrize(
    ("counts", "fraction", "reason"),
    [
        ([20, 1], 0.5, "1 member|only 1"),
        ([5, 5], 0.1, "1 should be greater or equal to the number of classes"),
        ([100, 2], 0.9, r"left to train on.* holds out all images of \['b'\]"),
    ],
)
def test_impossible_split(counts, fraction, reason):
    targets = encode(np.repeat(["a", "b"], counts))
    with pytest.raises(ValueError, match=reason):
        validation_mask(targets, fraction, 0)


class Unstratified:
    """Kind of target without labels to stratify by."""

    def strata(self, y):
        return None


def test_split_without_strata():
    n = 50
    targets = EncodedTargets(Unstratified(), np.arange(n), np.zeros(n), np.ones(n))
    held_out = validation_mask(targets, 0.2, 0)
    assert held_out.sum() == 10
    np.testing.assert_array_equal(validation_mask(targets, 0.2, 0), held_out)
    assert (validation_mask(targets, 0.2, 1) != held_out).any()
    selected = selection_mask(targets, 7, 0)
    assert selected.sum() == 7
    np.testing.assert_array_equal(selection_mask(targets, 7, 0), selected)


@pytest.mark.parametrize("n_held_out", [15, 30, 150])
def test_selection_mask_is_stratified_and_reproducible(n_held_out):
    y = np.repeat(["a", "b", "c"], [200, 80, 20])
    targets = encode(np.random.default_rng(0).permutation(y))
    held_out = selection_mask(targets, n_held_out, 3)
    expected = np.array([200, 80, 20]) * n_held_out / 300
    np.testing.assert_allclose(np.bincount(targets.y[held_out]), expected, atol=1)
    assert held_out.sum() == n_held_out
    np.testing.assert_array_equal(selection_mask(targets, n_held_out, 3), held_out)
    assert (selection_mask(targets, n_held_out, 4) != held_out).any()


@pytest.mark.parametrize("counts", [[2, 2], [2, 2, 2, 9], [3, 50], [2] * 20])
@pytest.mark.parametrize("n_held_out", [1, 5, 10**6])
def test_selection_mask_of_few_samples(counts, n_held_out):
    targets = encode(np.repeat(np.arange(len(counts)), counts))
    held_out = selection_mask(targets, n_held_out, 0)
    for mask in (held_out, ~held_out):
        assert mask.sum() >= len(counts)
    assert len(np.unique(targets.y[~held_out])) == len(counts)


def test_selection_mask_is_none_if_a_class_has_one_sample():
    assert selection_mask(encode(["a"] * 20 + ["b"]), 5, 0) is None
    weight = [1.0] * 20 + [1.0, 0.0]  # one of the two samples has no weight
    assert selection_mask(encode(["a"] * 20 + ["b"] * 2, weight), 5, 0) is None


@pytest.mark.parametrize("seed", range(5))
def test_samples_of_a_class_weight_of_zero_are_not_held_out(seed):
    y = ["a"] * 198 + ["b"] * 2
    targets = encode(y, class_weight={"a": 0, "b": 1})
    for held_out in (
        validation_mask(targets, 0.1, seed),
        selection_mask(targets, 30, seed),
    ):
        assert held_out.shape == (200,)
        assert targets.sample_weight[held_out].tolist() == [1]
    assert selection_mask(encode(y[:-1], class_weight={"a": 0}), 30, seed) is None


def test_groups_are_held_out_together():
    y = np.repeat(["a", "b"], 40)
    groups = np.arange(80) // 8
    targets = replace(encode(y), groups=groups)
    masks = validation_mask(targets, 0.2, 0), selection_mask(targets, 20, 0)
    for held_out, n in zip(masks, (16, 16), strict=True):
        assert held_out.sum() == n
        assert not set(groups[held_out]) & set(groups[~held_out])
        assert len(np.unique(targets.y[held_out])) == 2


@pytest.mark.parametrize("seed", range(3))
def test_class_weight_of_zero_in_groups_that_are_held_out(seed):
    """Images of the class are left, since a probe needs one of each class."""
    y = np.tile(["a", "a", "b", "b", "c"], 8)
    targets = encode(y, class_weight={"c": 0})
    targets = replace(targets, groups=np.where(y == "c", 0, np.arange(40) // 5))
    for held_out in (
        validation_mask(targets, 0.3, seed),
        selection_mask(targets, 20, seed),
    ):
        assert held_out.any()
        assert targets.sample_weight[held_out].all()


def test_groups_that_cannot_be_held_out():
    targets = replace(encode(["a", "b"] * 20), groups=np.arange(40) % 2)
    with pytest.raises(ValueError, match="Whole groups, of at least two classes"):
        validation_mask(targets, 0.2, 0)
    assert selection_mask(targets, 20, 0) is None
