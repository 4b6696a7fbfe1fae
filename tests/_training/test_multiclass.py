"""Tests of multiclass targets: encoding, weights, loss, score, documents."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.exceptions import DataConversionWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils.class_weight import compute_sample_weight
from torch import nn

from sktl._training.multiclass import (
    MulticlassTarget,
    WeightedCrossEntropy,
    encode_multiclass,
    multiclass_from_document,
)

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


def encode(y, sample_weight=None, class_weight=None, classes=None, n_samples=None):
    return encode_multiclass(
        len(y) if n_samples is None else n_samples,
        y,
        sample_weight,
        class_weight=class_weight,
        classes=classes,
        estimator=LogisticRegression(),
    )


def encode_normalized(y, *arguments, **options):
    return encode(y, *arguments, **options).with_normalized_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_targets_are_positions_in_the_sorted_classes(kind):
    y = np.asarray(KINDS[kind])
    classes, encoded = np.unique(y, return_inverse=True)
    got = encode_normalized(KINDS[kind])
    np.testing.assert_array_equal(got.target.classes, classes)
    assert got.target.classes.dtype == y.dtype
    assert got.target.n_outputs == len(classes)
    np.testing.assert_array_equal(got.y, encoded)
    np.testing.assert_array_equal(got.rows, np.arange(6))
    np.testing.assert_array_equal(got.sample_weight, np.ones(6))


@pytest.mark.parametrize("sample_weight", [None, [1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("kind", KINDS)
def test_class_weight_is_that_of_scikit_learn(kind, sample_weight):
    y = np.asarray(KINDS[kind])
    class_weight = {label: 1 + i for i, label in enumerate(np.unique(y).tolist())}
    expected = compute_sample_weight(class_weight, y)
    if sample_weight is not None:
        expected = expected * sample_weight
    got = encode_normalized(KINDS[kind], sample_weight, class_weight)
    np.testing.assert_allclose(got.sample_weight, expected / expected.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_class_weights(kind):
    expected = compute_sample_weight("balanced", np.asarray(KINDS[kind]))
    got = encode_normalized(KINDS[kind], class_weight="balanced")
    np.testing.assert_allclose(got.sample_weight, expected)
    weighted = encode_normalized(KINDS[kind], [1, 2, 3, 4, 5, 6], "balanced")
    of_class = np.bincount(weighted.y, weighted.sample_weight)
    np.testing.assert_allclose(of_class, of_class.mean())
    assert weighted.sample_weight.mean() == pytest.approx(1)


def test_normalized_weights_do_not_depend_on_the_scale():
    small, large = (
        encode_normalized(KINDS["str"], np.arange(1, 7) * s) for s in (1e-9, 1e9)
    )
    np.testing.assert_allclose(small.sample_weight, large.sample_weight)
    np.testing.assert_allclose(small.sample_weight, np.arange(1, 7) / 3.5)


def test_samples_of_weight_zero_are_dropped():
    y, weight = np.array(list("cabcab")), np.array([0, 1, 2, 0, 3, 0])
    got, without = (
        encode_normalized(y, weight),
        encode_normalized(y[weight > 0], weight[weight > 0]),
    )
    np.testing.assert_array_equal(got.rows, [1, 2, 4])
    assert got.target.classes.tolist() == ["a", "b"]
    np.testing.assert_array_equal(got.y, without.y)
    np.testing.assert_array_equal(got.sample_weight, without.sample_weight)


def test_classes_of_weight_zero_are_kept():
    got = encode_normalized([0, 1, 1, 2], class_weight={0: 0, 1: 1, 2: 1})
    assert got.target.classes.tolist() == [0, 1, 2]
    assert got.sample_weight.tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])


def test_classes_that_do_not_occur_in_y():
    got = encode_normalized(["b", "b"], classes=["c", "b", "a", "b"])
    assert got.target.classes.tolist() == ["a", "b", "c"]
    assert got.y.tolist() == [1, 1]
    got = encode_normalized(
        np.array(["b", "a"], object), classes=np.array(["a", "b", "ccc"])
    )
    assert got.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        (None, "requires y to be passed"),
        ([1.0, np.nan, 2.0], r"y\[1\] is missing \(nan\)"),
        ([1.0, np.inf, 2.0], "contains infinity"),
        (["a", None, "b"], r"y\[1\] is missing \(None\)"),
        ([0.1, 0.7, 3.4], "Unknown label type: continuous"),
        ([[0, 1], [1, 0], [1, 1]], "1d array"),
        ([1, 2], r"inconsistent numbers of samples: \[3, 2\]"),
        (["a", "a", "a"], r"at least two classes\. Got one class: \['a'\]"),
        ([1 + 1j, 2, 1], "Complex data not supported"),
    ],
)
def test_invalid_y(y, reason):
    with pytest.raises(ValueError, match=reason):
        encode_normalized(y, n_samples=3)


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (["a", "b"], r"only the classes \['a', 'b'\]\. Got \['c'\] as well"),
        ([0, 1], "as well"),
        (["c"], r"two classes\. Got one class: \['c'\]"),
    ],
)
def test_labels_that_are_not_in_classes(classes, reason):
    with pytest.raises(ValueError, match=reason):
        encode_normalized(["c", "c"], classes=classes)


@pytest.mark.parametrize(
    ("sample_weight", "reason"),
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
def test_invalid_sample_weight(sample_weight, reason):
    with pytest.raises(ValueError, match=reason):
        encode_normalized(["a", "b", "a"], sample_weight)


@pytest.mark.parametrize(
    "class_weight",
    [{0: 0, 1: 0}, {0: -1, 1: 2}, {0: -1, 1: 1}, {0: np.nan, 1: 1}, {0: np.inf, 1: 1}],
)
def test_invalid_class_weight(class_weight):
    with pytest.raises(
        ValueError, match="class_weight must be finite and not negative"
    ):
        encode_normalized([0, 1], class_weight=class_weight)


def test_y_as_a_column_warns():
    with pytest.warns(DataConversionWarning, match="column-vector y"):
        got = encode_normalized(np.array([["a"], ["b"]]))
    assert got.y.tolist() == [0, 1]


def test_arguments_are_not_changed():
    y, weight = np.array([3, 7, 7, 3]), np.array([1.0, 0.0, 2.0, 3.0])
    before = y.copy(), weight.copy()
    encode_normalized(y, weight, {3: 2, 7: 1})
    np.testing.assert_array_equal(y, before[0])
    np.testing.assert_array_equal(weight, before[1])


def test_weights_of_parts_equal_weights_of_the_whole():
    weights = {"a": 5, "b": 1, "c": 2}
    whole = encode(list("abab"), class_weight=weights, classes=list("abc"))
    parts = [
        encode([label], class_weight=weights, classes=list("abc")) for label in "abab"
    ]
    assert whole.sample_weight.tolist() == [5, 1, 5, 1]
    assert [part.sample_weight.item() for part in parts] == [5, 1, 5, 1]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_loss_equals_cross_entropy_of_torch(label_smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator)
    y = torch.randint(3, (8,), generator=generator)
    loss = MulticlassTarget(np.arange(3), label_smoothing).loss()
    expected = nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits, y)
    torch.testing.assert_close(loss(logits, (y, torch.ones(8))), expected)


def test_weight_2_has_the_gradient_of_two_samples():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y, sample_weight = torch.tensor([0, 3, 1]), torch.tensor([1.0, 2.0, 0.0])
    criterion = WeightedCrossEntropy(0.1)
    weighted = logits.clone().requires_grad_()
    (3 * criterion(weighted, (y, sample_weight))).backward()
    repeated = logits[[0, 1, 1]].clone().requires_grad_()
    (3 * criterion(repeated, (y[[0, 1, 1]], torch.ones(3)))).backward()
    torch.testing.assert_close(weighted.grad[0], repeated.grad[0])
    torch.testing.assert_close(weighted.grad[1], repeated.grad[1] + repeated.grad[2])
    assert not weighted.grad[2].any()


def test_score_and_decode():
    classes = np.array(["a", "b", "c"])
    outputs = np.array([[3, 1, 2], [0, 1, 9], [0, 5, 4], [1, 0, 0]], np.float32)
    y, sample_weight = np.array([0, 1, 1, 2]), np.array([1.0, 2.0, 3.0, 0.5])
    target = MulticlassTarget(classes)
    assert target.decode(outputs).tolist() == ["a", "c", "b", "a"]
    expected = accuracy_score(
        classes[y], target.decode(outputs), sample_weight=sample_weight
    )
    assert target.score(outputs, y, sample_weight) == pytest.approx(expected)


def test_linear_probe_needs_all_classes():
    target = MulticlassTarget(np.array(["a", "b", "c"]))
    assert target.is_complete(np.array([2, 0, 1, 1]))
    assert not target.is_complete(np.array([2, 0, 2]))
    assert target.strata(np.array([2, 0])).tolist() == ["c", "a"]


@pytest.mark.parametrize("caller", ["warm_start", "partial_fit"])
def test_check_unchanged(caller):
    first = MulticlassTarget(np.array(["a", "b"]))
    MulticlassTarget(np.array(["a", "b"], object)).check_unchanged(first, caller)
    reason = rf"{caller} must get the classes of the first fit, \['a', 'b'\]\. Got"
    for classes in (["a", "c"], ["a"], ["a", "b", "c"], [0, 1]):
        with pytest.raises(ValueError, match=reason):
            MulticlassTarget(np.array(classes)).check_unchanged(first, caller)


@pytest.mark.parametrize("kind", KINDS)
def test_document_round_trip(kind):
    target = encode(KINDS[kind]).target
    loaded = multiclass_from_document(json.loads(json.dumps(target.to_document())))
    np.testing.assert_array_equal(loaded.classes, target.classes)
    assert loaded.classes.dtype == target.classes.dtype


DOCUMENT = {"kind": "multiclass", "classes": ["a", "b"], "dtype": "<U1"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classes": None}, "must be a list"),
        ({"classes": "ab"}, "must be a list"),
        ({"classes": ["a", None]}, "must be str, int, float or bool"),
        ({"classes": ["a", ["b"]]}, "must be str, int, float or bool"),
        ({"classes": ["a", {"pairs": 3}]}, "list of pairs"),
        ({"classes": ["a"]}, "at least two different labels"),
        ({"classes": []}, "at least two different labels"),
        ({"classes": ["a", "a"]}, "at least two different labels"),
        ({"classes": ["a", "bb"]}, "at least two different labels"),
        ({"classes": [1, 300], "dtype": "|u1"}, "valid dtype|different labels"),
        ({"dtype": "no dtype"}, "valid dtype"),
        ({"dtype": 3}, "valid dtype"),
    ],
)
def test_invalid_document(change, reason):
    with pytest.raises(ValueError, match=reason):
        multiclass_from_document({**DOCUMENT, **change})


def test_fingerprint_does_not_depend_on_the_dtype():
    labels = ["a", "bb"]
    text, objects = (
        MulticlassTarget(np.array(labels, dtype)) for dtype in ("<U9", object)
    )
    assert text.fingerprint() == objects.fingerprint() == {"classes": labels}
    assert text.to_document() != objects.to_document()


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_calibrated_loss_is_the_log_loss_at_the_best_temperature(n_classes, scale):
    rng = np.random.default_rng(0)
    y = rng.integers(n_classes, size=60)
    logits = rng.normal(size=(60, n_classes)) + 1.5 * np.eye(n_classes)[y]
    weight = rng.uniform(0.2, 3, 60)
    target = MulticlassTarget(np.arange(n_classes))
    temperatures = np.geomspace(0.2, 5, 800)
    proba = softmax(logits / temperatures[:, None, None], axis=2)
    losses = -np.log(proba[:, np.arange(60), y]) @ weight / weight.sum()
    best = int(np.argmin(losses))
    assert 0 < best < 799
    expected = log_loss(y, proba[best], sample_weight=weight)
    got = target.calibrated_losses((scale * logits).astype("f4"), y, weight).mean()
    assert got == pytest.approx(expected, rel=1e-4)
    assert got < log_loss(y, softmax(logits, axis=1), sample_weight=weight)


def test_calibrated_loss_of_outputs_that_are_wrong_or_all_correct():
    target, y, weight = MulticlassTarget(np.arange(2)), np.array([0, 1]), np.ones(2)
    correct = np.array([[9.0, 0.0], [0.0, 9.0]])
    assert 0 <= target.calibrated_losses(correct, y, weight).mean() < 1e-6
    wrong = target.calibrated_losses(-correct, y, weight).mean()
    assert np.log(2) < wrong < 1  # almost equal probabilities
