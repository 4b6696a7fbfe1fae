"""Labels of any kind, and how much each image counts, as scikit-learn has it."""

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import DataConversionWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_sample_weight

from sktl._training.targets import encode_targets, validation_mask

KINDS = {
    "str": ["b", "a", "c", "a", "a", "b"],
    "bool": [True, False, True, False, False, True],
    "int": [7, 3, 7, 3, 3, 7],
    "negative": [-1, 1, -1, 1, 1, -1],
    "uint8": np.array([7, 3, 7, 3, 3, 7], "u1"),
    "float": [2.0, 1.0, 2.0, 1.0, 1.0, 2.0],
    "object": np.array(["b", "a", "b", "a", "a", "ccc"], object),
    "category": pd.Series(list("bacaab"), dtype="category"),
    "series": pd.Series([7, 3, 7, 3, 3, 7], index=[9, 8, 7, 6, 5, 4]),
}


def given(y, sample_weight=None, class_weight=None, classes=None, n=None):
    return raw(y, sample_weight, class_weight, classes, n).rescaled()


def raw(y, sample_weight=None, class_weight=None, classes=None, n=None):
    return encode_targets(
        range(len(y) if n is None else n),
        y,
        sample_weight,
        class_weight=class_weight,
        classes=classes,
        estimator=LogisticRegression(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_positions_in_sorted_classes(kind):
    y = np.asarray(KINDS[kind])
    classes, label = np.unique(y, return_inverse=True)
    got = given(KINDS[kind])
    np.testing.assert_array_equal(got.classes, classes)
    assert got.classes.dtype == y.dtype
    np.testing.assert_array_equal(got.label, label)
    np.testing.assert_array_equal(got.rows, np.arange(6))
    np.testing.assert_array_equal(got.weight, np.ones(6))


@pytest.mark.parametrize("sample_weight", [None, [1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("kind", KINDS)
def test_class_weight_is_that_of_scikit_learn(kind, sample_weight):
    y = np.asarray(KINDS[kind])
    by_hand = {label: 1 + i for i, label in enumerate(np.unique(y).tolist())}
    expected = compute_sample_weight(by_hand, y)
    if sample_weight is not None:
        expected = expected * sample_weight
    got = given(KINDS[kind], sample_weight, by_hand)
    np.testing.assert_allclose(got.weight, expected / expected.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_classes_weigh_the_same(kind):
    expected = compute_sample_weight("balanced", np.asarray(KINDS[kind]))
    got = given(KINDS[kind], class_weight="balanced")
    np.testing.assert_allclose(got.weight, expected)
    weighted = given(KINDS[kind], [1, 2, 3, 4, 5, 6], "balanced")
    of_class = np.bincount(weighted.label, weighted.weight)
    np.testing.assert_allclose(of_class, of_class.mean())
    assert weighted.weight.mean() == pytest.approx(1)


def test_the_scale_of_weights_is_of_no_account():
    small, large = (given(KINDS["str"], np.arange(1, 7) * s) for s in (1e-9, 1e9))
    np.testing.assert_allclose(small.weight, large.weight)
    np.testing.assert_allclose(small.weight, np.arange(1, 7) / 3.5)


def test_weight_zero_is_not_there():
    y, weight = np.array(list("cabcab")), np.array([0, 1, 2, 0, 3, 0])
    got, without = given(y, weight), given(y[weight > 0], weight[weight > 0])
    np.testing.assert_array_equal(got.rows, [1, 2, 4])
    assert got.classes.tolist() == ["a", "b"]
    np.testing.assert_array_equal(got.label, without.label)
    np.testing.assert_array_equal(got.weight, without.weight)


def test_a_class_of_weight_zero_is_there_but_does_not_count():
    got = given([0, 1, 1, 2], class_weight={0: 0, 1: 1, 2: 1})
    assert got.classes.tolist() == [0, 1, 2]
    assert got.weight.tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])


def test_classes_that_are_to_come():
    got = given(["b", "b"], classes=["c", "b", "a", "b"])
    assert got.classes.tolist() == ["a", "b", "c"]
    assert got.label.tolist() == [1, 1]
    got = given(np.array(["b", "a"], object), classes=np.array(["a", "b", "ccc"]))
    assert got.label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        (None, "requires y to be passed"),
        ([1.0, np.nan, 2.0], "contains NaN"),
        ([1.0, np.inf, 2.0], "contains infinity"),
        (np.array(["a", np.nan, "b"], object), "contains NaN"),
        ([0.1, 0.7, 3.4], "Unknown label type: continuous"),
        ([[0, 1], [1, 0], [1, 1]], "1d array"),
        ([1, 2], r"inconsistent numbers of samples: \[3, 2\]"),
        (["a", "a", "a"], r"at least two classes\. Got one class: \['a'\]"),
        ([1 + 1j, 2, 1], "Complex data not supported"),
    ],
)
def test_no_labels_for_a_classifier(y, reason):
    with pytest.raises(ValueError, match=reason):
        given(y, n=3)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (["a", "b"], r"classes \['a', 'b'\] only\. Got \['c'\] as well"),
        ([0, 1], "as well"),
        (["c"], r"two classes\. Got one class: \['c'\]"),
    ],
)
def test_no_label_of_the_classes(classes, reason):
    with pytest.raises(ValueError, match=reason):
        given(["c", "c"], classes=classes)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        ([0, 0, 0], "at least one non-zero number"),
        ([1, -1, 1], "Negative values"),
        ([1, np.nan, 1], "contains NaN"),
        ([1, np.inf, 1], "contains infinity"),
        ([1, 1], "sample_weight.shape == "),
        ([[1], [1], [1]], "must be 1D"),
        ([1, 0, 1], "Got one class: "),
    ],
)
def test_no_weights_of_samples(weight, reason):
    with pytest.raises(ValueError, match=reason):
        given(["a", "b", "a"], weight)


@pytest.mark.parametrize(
    "class_weight",
    [{0: 0, 1: 0}, {0: -1, 1: 2}, {0: -1, 1: 1}, {0: np.nan, 1: 1}, {0: np.inf, 1: 1}],
)
def test_no_weights_of_classes(class_weight):
    with pytest.raises(ValueError, match="class_weight must not be negative"):
        given([0, 1], class_weight=class_weight)


def test_a_column_of_labels_warns():
    with pytest.warns(DataConversionWarning, match="column-vector y"):
        got = given(np.array([["a"], ["b"]]))
    assert got.label.tolist() == [0, 1]


def test_what_is_given_stays_as_it_is():
    y, weight = np.array([3, 7, 7, 3]), np.array([1.0, 0.0, 2.0, 3.0])
    before = y.copy(), weight.copy()
    given(y, weight, {3: 2, 7: 1})
    np.testing.assert_array_equal(y, before[0])
    np.testing.assert_array_equal(weight, before[1])


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_held_out_rows_are_stratified_and_the_same_again(fraction):
    y = np.repeat(["a", "b", "c"], [200, 80, 20])
    mine = given(np.random.default_rng(0).permutation(y))
    held_out = validation_mask(mine, fraction, 3)
    expected = np.array([200, 80, 20]) * fraction
    np.testing.assert_array_equal(np.bincount(mine.label[held_out]), expected)
    np.testing.assert_array_equal(validation_mask(mine, fraction, 3), held_out)
    assert (validation_mask(mine, fraction, 4) != held_out).any()


def test_held_out_are_rows_of_some_weight():
    mine = given(["a", "b"] * 20, [0, 0, 1, 1] * 10)
    held_out = validation_mask(mine, 0.2, 0)
    assert held_out.shape == mine.rows.shape == (20,)
    assert held_out.sum() == 4
    assert not validation_mask(mine, None, 0).any()


@pytest.mark.parametrize(
    ("counts", "fraction", "reason"),
    [
        ([20, 1], 0.5, "1 member|only 1"),
        ([5, 5], 0.1, "1 should be greater or equal to the number of classes"),
        ([100, 2], 0.9, r"left to learn from.* holds out all of \['b'\]"),
    ],
)
def test_too_few_to_hold_some_out(counts, fraction, reason):
    mine = given(np.repeat(["a", "b"], counts))
    with pytest.raises(ValueError, match=reason):
        validation_mask(mine, fraction, 0)


def test_in_parts_weights_are_what_they_would_be_of_all():
    weights = {"a": 5, "b": 1, "c": 2}
    whole = raw(list("abab"), class_weight=weights, classes=list("abc"))
    parts = [raw([x], class_weight=weights, classes=list("abc")) for x in "abab"]
    assert whole.weight.tolist() == [5, 1, 5, 1]
    assert [part.weight.item() for part in parts] == [5, 1, 5, 1]
