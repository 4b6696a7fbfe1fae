"""Tests of multilabel targets: encoding, weights, loss, score, documents."""

import json

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from trainer_helpers import make_classifier

from sktl._training.multiclass import MulticlassTarget
from sktl._training.multilabel import (
    MultilabelTarget,
    WeightedBinaryCrossEntropy,
    encode_multilabel,
    multilabel_from_document,
)

Y = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [1, 1, 0]])
UNIFORM = np.ones((3, 2))


def encode(y, sample_weight=None, class_weight=None, classes=None, n_samples=None):
    return encode_multilabel(
        5 if n_samples is None else n_samples,
        y,
        sample_weight,
        class_weight=class_weight,
        classes=classes,
        estimator=LogisticRegression(),
    )


@pytest.mark.parametrize(
    "convert", [np.array, scipy.sparse.csr_array, np.ndarray.tolist]
)
def test_encoded_targets_are_the_matrix(convert):
    targets = encode(convert(Y))
    np.testing.assert_array_equal(targets.y, Y)
    np.testing.assert_array_equal(targets.target.labels(targets.y), Y)
    assert targets.target.n_outputs == 3
    assert targets.target.classes.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(targets.target.class_weights, UNIFORM)


def test_samples_of_weight_zero_are_dropped():
    weight = [0, 1, 2, 0, 3]
    targets = encode(Y, weight)
    np.testing.assert_array_equal(targets.rows, [1, 2, 4])
    np.testing.assert_array_equal(targets.y, Y[[1, 2, 4]])
    np.testing.assert_array_equal(targets.sample_weight, [1, 2, 3])


@pytest.mark.parametrize("sample_weight", [None, [1, 2, 3, 4, 5]])
def test_balanced_class_weights_are_those_of_each_column(sample_weight):
    got = encode(Y, sample_weight, "balanced").target.class_weights
    for column, weights in zip(Y.T, got, strict=True):
        expected = compute_class_weight(
            "balanced",
            classes=np.arange(2),
            y=column,
            sample_weight=np.asarray(sample_weight or [1] * 5),
        )
        np.testing.assert_allclose(weights, expected)
    constant = encode(np.column_stack([Y[:, 0], np.ones(5)]), None, "balanced")
    assert constant.target.class_weights[1].tolist() == [1, 1]


def test_class_weights_for_all_labels_and_for_each():
    every = encode(Y, class_weight={1: 5}).target.class_weights
    assert every.tolist() == [[1, 5], [1, 5], [1, 5]]
    each = encode(Y, class_weight=[{0: 2}, {0: 1, 1: 3}, {False: 4, True: 5}])
    assert each.target.class_weights.tolist() == [[2, 1], [1, 3], [4, 5]]


@pytest.mark.parametrize(
    ("class_weight", "reason"),
    [
        ([{0: 1}], r"one dict for each column of y. Got 1 for 3"),
        ({"a": 1}, "weights of 0 and 1"),
        ({0: -1}, "finite and not negative"),
        ({1: np.nan}, "finite and not negative"),
        ({0: 0, 1: 0}, "finite and not negative"),
    ],
)
def test_invalid_class_weight(class_weight, reason):
    with pytest.raises(ValueError, match=reason):
        encode(Y, class_weight=class_weight)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss_equals_binary_cross_entropy_of_torch(label_smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 3, generator=generator)
    weight = torch.rand(5, generator=generator)
    class_weights = np.array([[1.0, 2.0], [0.5, 3.0], [1.0, 0.0]])
    y = torch.from_numpy(Y.astype(np.uint8))
    smooth = y * (1 - label_smoothing) + label_smoothing / 2
    each = torch.from_numpy(np.where(Y, class_weights[:, 1], class_weights[:, 0]))
    expected = nn.BCEWithLogitsLoss(weight=each * weight[:, None])(logits, smooth)
    loss = WeightedBinaryCrossEntropy(class_weights, label_smoothing)
    got = loss(logits, (y, weight))
    torch.testing.assert_close(got, expected.float())
    target = MultilabelTarget(class_weights, label_smoothing)
    torch.testing.assert_close(target.loss()(logits, (y, weight)), got)


@pytest.mark.slow
def test_a_repeated_label_is_trained_as_two_classes(images):
    # The log-odds and the features change as much per step.
    y = np.arange(40) % 7 == 3
    parameters = {"lr": 1e-3, "weight_decay": 0, "max_epochs": 2}
    alone = make_classifier(**parameters).fit(images, y).decision_function(images)
    both = make_classifier(**parameters).fit(images, np.column_stack([y, y]))
    initial = make_classifier(max_epochs=0).fit(images, y).decision_function(images)
    difference = both.decision_function(images) - alone[:, None]
    assert np.abs(difference).max() < 0.05 * np.abs(alone - initial).max()


def test_score_decode_and_probabilities():
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype("f4")
    weight = np.array([1.0, 2, 0.5, 1, 3])
    target = MultilabelTarget(UNIFORM)
    predicted = target.decode(logits)
    np.testing.assert_allclose(target.probabilities(logits), expit(logits))
    np.testing.assert_array_equal(predicted, target.probabilities(logits) > 0.5)
    np.testing.assert_array_equal(target.decision_values(logits), logits)
    expected = accuracy_score(
        Y.ravel(), predicted.ravel(), sample_weight=np.repeat(weight, 3)
    )
    assert target.score(logits, Y, weight) == pytest.approx(expected)
    only_present = MultilabelTarget(np.array([[0.0, 1.0]] * 3))
    expected = predicted[Y == 1] @ np.repeat(weight, Y.sum(axis=1))
    expected /= np.repeat(weight, Y.sum(axis=1)).sum()
    assert only_present.score(logits, Y, weight) == pytest.approx(expected)
    assert only_present.score(logits, 0 * Y, weight) == 0


@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_calibrated_loss_is_the_log_loss_at_the_best_temperature(scale):
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=(60, 2))
    logits = rng.normal(size=(60, 2)) + 2 * y - 1
    weight = rng.uniform(0.2, 3, 60)
    losses = [
        log_loss(
            y.ravel(), expit(logits / t).ravel(), sample_weight=np.repeat(weight, 2)
        )
        for t in np.geomspace(0.2, 5, 100)
    ]
    assert 0 < np.argmin(losses) < 99
    got = MultilabelTarget(np.ones((2, 2))).calibrated_losses(scale * logits, y, weight)
    assert got.shape == (60,)
    assert got.mean() == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize(
    ("y", "classes", "reason"),
    [
        ([[0, 1], [np.nan, 1]], None, r"y\[1, 0\] is missing"),
        ([[0, 1], [-1, 1]], None, r"y\[1, 0\] = -1"),
        ([[0, 1]], None, r"inconsistent numbers of samples: \[2, 1\]"),
        ([[0, 1], [1, 1]], [0, 1, 2], "Got 3 for 2 columns"),
    ],
)
def test_invalid_y(y, classes, reason):
    with pytest.raises(ValueError, match=reason):
        encode(y, classes=classes, n_samples=2)


def test_further_targets():
    target = MultilabelTarget(UNIFORM)
    np.testing.assert_array_equal(target.encode(Y, "y_val", LogisticRegression()), Y)
    for y, reason in (
        (Y[:, :2], "y_val must have as many columns as y, 3. Got 2"),
        (Y[:, 0], "y_val must be an indicator matrix"),
        (2 * Y, r"y_val\[0, 1\] = 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            target.encode(y, "y_val", LogisticRegression())


def test_check_unchanged():
    first = MultilabelTarget(UNIFORM)
    MultilabelTarget(2 * UNIFORM).check_unchanged(first, "warm_start")
    with pytest.raises(ValueError, match=r"which had 3 columns\. Got 2"):
        MultilabelTarget(np.ones((2, 2))).check_unchanged(first, "warm_start")
    with pytest.raises(ValueError, match=r"which is multilabel\. Got multiclass"):
        MulticlassTarget(np.arange(3)).check_unchanged(first, "partial_fit")


def test_any_labels_have_a_probe_and_no_strata():
    target = MultilabelTarget(UNIFORM)
    assert target.is_complete(0 * Y)
    assert target.strata(Y) is None


def test_document_round_trip():
    target = MultilabelTarget(5 * UNIFORM)
    loaded = multilabel_from_document(json.loads(json.dumps(target.to_document())))
    assert loaded.n_outputs == 3
    assert loaded.fingerprint() == target.fingerprint() == {"n_labels": 3}


@pytest.mark.parametrize("n_outputs", [None, "3", 1, -2, True, 10**9])
def test_invalid_document(n_outputs):
    with pytest.raises(ValueError, match="its "):
        multilabel_from_document({"kind": "multilabel", "n_outputs": n_outputs})
