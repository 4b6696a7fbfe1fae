"""The head that is put in says what scikit-learn's model says."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sktl._training import linear_probe
from sktl._training.linear_probe import C_GRID, fit_linear_probe

WIDTHS = [(), (6,), (6, 4)]


def data(n_classes, n=90, seed=0):
    """Columns of different scales and offsets, and noisy labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    score = x @ rng.normal(size=(5, n_classes)) + rng.gumbel(size=(n, n_classes))
    label = score.argmax(axis=1)
    label[: 2 * n_classes] = np.repeat(np.arange(n_classes), 2)
    x = x * [1, 10, 0.01, 3, 0.5] + [0, 100, 1, -7, 2]
    return x.astype(np.float32), label


def head_of(n_classes, hidden=(), n_features=5):
    widths = [n_features, *hidden]
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Dropout(0.5), nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(widths[-1], n_classes))


def solved(x, label, weight=None, hidden=(), seed=0):
    """Give the strength chosen, and what the head says: log-probabilities."""
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
    head = head_of(int(label.max()) + 1, hidden, x.shape[1]).eval()
    C = fit_linear_probe(head, x, label, weight, hidden_layer_sizes=hidden, seed=seed)
    with torch.no_grad():
        return C, log_softmax(head(torch.from_numpy(x)).numpy(), axis=1)


def model(C, hidden=(), seed=0):
    if hidden:
        return MLPClassifier(
            hidden, solver="lbfgs", alpha=1 / C, max_iter=200, random_state=seed
        )
    return LogisticRegression(C=C, max_iter=1000)


@pytest.fixture
def strength(monkeypatch):
    """Fix the strength of the penalty."""
    monkeypatch.setattr(linear_probe, "C_GRID", np.array([0.1]))
    return 0.1


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_the_head_says_what_the_model_says(n_classes, hidden):
    x, label = data(n_classes)
    C, got = solved(x, label, hidden=hidden, seed=3)
    assert C in C_GRID
    expected = make_pipeline(StandardScaler(), model(C, hidden, 3))
    expected.fit(x.astype(float), label)
    np.testing.assert_allclose(
        np.exp(got), expected.predict_proba(x.astype(float)), atol=1e-4
    )


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_strength_is_the_one_of_least_cross_validated_loss(n_classes, weighted):
    for seed in range(4):
        x, label = data(n_classes, seed=seed)
        weight = np.random.default_rng(seed).uniform(0.2, 4, len(x)) ** weighted
        scaled = StandardScaler().fit(x, sample_weight=weight).transform(x)
        losses = []
        for C in C_GRID:
            folds = StratifiedKFold(5, shuffle=True, random_state=seed)
            losses.append(0)
            for train, test in folds.split(x, label):
                fitted = LogisticRegression(C=C, max_iter=1000)
                fitted.fit(scaled[train], label[train], weight[train])
                proba = fitted.predict_proba(scaled[test])
                loss = -np.log(proba[np.arange(len(test)), label[test]])
                losses[-1] += np.average(loss, weights=weight[test])
        assert solved(x, label, weight, seed=seed)[0] == C_GRID[np.argmin(losses)]


def test_noise_is_penalized_more_than_what_is_sure():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 5)).astype(np.float32)
    sure, _ = solved(x, (x[:, 0] > 0).astype(int))
    noise, _ = solved(x, rng.integers(2, size=100))
    assert noise == C_GRID[0]
    assert sure > 100 * noise


@pytest.mark.parametrize("n_classes", [2, 3])
def test_weight_zero_is_the_same_as_not_there(strength, n_classes):
    x, label = data(n_classes)
    weight = np.arange(len(x)) % 3 + 0.5
    weight[n_classes * 2 :: 4] = 0
    _, got = solved(x, label, weight)
    head = head_of(n_classes).eval()
    there = weight > 0
    fit_linear_probe(head, x[there], label[there], weight[there])
    expected = head(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, log_softmax(expected, axis=1), atol=2e-3)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_weight_is_a_number_of_repetitions(strength, n_classes):
    x, label = data(n_classes)
    weight = np.arange(len(x)) % 4 + 1
    _, got = solved(x, label, weight)
    _, expected = solved(np.repeat(x, weight, axis=0), np.repeat(label, weight))
    np.testing.assert_allclose(np.repeat(got, weight, axis=0), expected, atol=2e-3)


def test_what_weighs_more_is_fitted_better(strength):
    x, label = data(3)
    weight = np.where(label == 1, 10, 1)
    plain, weighted = (
        solved(x, label, w)[1][label == 1, 1].mean() for w in (None, weight)
    )
    assert weighted > plain


@pytest.mark.parametrize("hidden", WIDTHS[:2])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e-30])
def test_a_constant_column_says_nothing(strength, hidden, value):
    x, label = data(3)
    _, expected = solved(x, label)
    x = np.hstack([x, np.full((len(x), 2), value, np.float32)])
    _, got = solved(x, label, hidden=hidden)
    assert np.isfinite(got).all()
    if not hidden:  # where a perceptron starts depends on the number of columns
        np.testing.assert_allclose(got, expected, atol=1e-2 if value == -1e4 else 1e-4)


@pytest.mark.parametrize("value", [1e-12, 1e-30, 1e-42])
def test_a_trace_in_one_image_is_not_made_large(value):
    x, label = data(2)
    x[:, 2] = 0
    x[3, 2] = value
    head = head_of(2)
    fit_linear_probe(head, x, label, np.ones(len(x)))
    assert head[-1].weight.abs().max() < 10
    assert head[-1].weight.isfinite().all()


def test_a_large_offset_costs_no_precision_that_matters():
    x, label = data(3)
    C, expected = solved(x, label)
    moved, got = solved(x + np.float32([0, 0, 0, 1000, 0]), label)
    assert moved == C
    np.testing.assert_allclose(got, expected, atol=1e-2)


@pytest.mark.parametrize("hidden", WIDTHS[:2])
def test_a_class_with_a_single_image(hidden):
    x, label = data(3)
    label[label == 2] = 0
    label[5] = 2
    C, got = solved(x, label, hidden=hidden)
    assert C == C_GRID[3]
    assert np.isfinite(got).all()


def test_a_class_with_two_images_makes_two_folds():
    x, label = data(2, n=60)
    label[:] = 0
    label[[5, 40]] = 1
    C, got = solved(x, label)
    assert C in C_GRID
    assert np.isfinite(got).all()


def test_many_images_are_divided_once():
    x, label = data(2, n=2000)
    scaled = StandardScaler().fit_transform(x)
    split = StratifiedShuffleSplit(1, test_size=0.2, random_state=1)
    (train, test), *_ = split.split(x, label)
    losses = []
    for C in C_GRID:
        fitted = LogisticRegression(C=C).fit(scaled[train], label[train])
        proba = fitted.predict_proba(scaled[test])
        losses.append(-np.log(proba[np.arange(len(test)), label[test]]).mean())
    assert solved(x, label, seed=1)[0] == C_GRID[np.argmin(losses)]


@pytest.mark.parametrize("many", [60, 2000])
@pytest.mark.parametrize("in_each", [2, 3, 4])
def test_many_classes_of_a_few_images(monkeypatch, in_each, many):
    monkeypatch.setattr(linear_probe, "_MANY", many)
    label = np.repeat(np.arange(60 // in_each), in_each)
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    C, got = solved(x, label)
    assert C in C_GRID
    assert np.isfinite(got).all()


@pytest.mark.parametrize("hidden", WIDTHS)
def test_the_same_seed_gives_the_same_bits_and_takes_none(hidden):
    x, label = data(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (solved(x.copy(), label, hidden=hidden, seed=5) for _ in range(2))
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(x, data(3)[0])
