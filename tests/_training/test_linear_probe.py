"""Tests of the linear probe: equal to the model of scikit-learn."""

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

WIDTHS = [(), (6,), pytest.param((6, 4), marks=pytest.mark.slow)]


def make_data(n_classes, n=90, seed=0):
    """Return features of different scales and offsets, and noisy targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    score = x @ rng.normal(size=(5, n_classes)) + rng.gumbel(size=(n, n_classes))
    y = score.argmax(axis=1)
    y[: 2 * n_classes] = np.repeat(np.arange(n_classes), 2)
    x = x * [1, 10, 0.01, 3, 0.5] + [0, 100, 1, -7, 2]
    return x.astype(np.float32), y


def make_head(n_classes, hidden=(), n_features=5):
    widths = [n_features, *hidden]
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Dropout(0.5), nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(widths[-1], n_classes))


def probe(x, y, weight=None, hidden=(), seed=0):
    """Return the selected C and the log-probabilities of the head."""
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
    head = make_head(int(y.max()) + 1, hidden, x.shape[1]).eval()
    C = fit_linear_probe(head, x, y, weight, hidden_layer_sizes=hidden, seed=seed)
    with torch.no_grad():
        return C, log_softmax(head(torch.from_numpy(x)).numpy(), axis=1)


def make_reference(C, hidden=(), seed=0):
    if hidden:
        return MLPClassifier(
            hidden, solver="lbfgs", alpha=1 / C, max_iter=200, random_state=seed
        )
    return LogisticRegression(C=C, max_iter=1000)


@pytest.fixture
def fixed_C(monkeypatch):
    """Fix the regularization fixed_C."""
    monkeypatch.setattr(linear_probe, "C_GRID", np.array([0.1]))
    return 0.1


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize(
    "n_classes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5))]
)
def test_head_equals_the_model_of_scikit_learn(monkeypatch, n_classes, hidden):
    if hidden:  # each value takes as long as all of them without hidden layers
        monkeypatch.setattr(linear_probe, "C_GRID", C_GRID[::4])
    x, y = make_data(n_classes)
    C, got = probe(x, y, hidden=hidden, seed=3)
    assert C in C_GRID
    expected = make_pipeline(StandardScaler(), make_reference(C, hidden, 3))
    expected.fit(x.astype(float), y)
    np.testing.assert_allclose(
        np.exp(got), expected.predict_proba(x.astype(float)), atol=1e-4
    )


@pytest.mark.parametrize("n_classes", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "weighted", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_selected_C_has_the_least_cross_validated_loss(n_classes, weighted):
    for seed in range(2):
        x, y = make_data(n_classes, seed=seed)
        weight = np.random.default_rng(seed).uniform(0.2, 4, len(x)) ** weighted
        scaled = StandardScaler().fit(x, sample_weight=weight).transform(x)
        losses = []
        for C in C_GRID:
            folds = StratifiedKFold(5, shuffle=True, random_state=seed)
            losses.append(0)
            for train, test in folds.split(x, y):
                fitted = LogisticRegression(C=C, max_iter=1000)
                fitted.fit(scaled[train], y[train], weight[train])
                proba = fitted.predict_proba(scaled[test])
                loss = -np.log(proba[np.arange(len(test)), y[test]])
                losses[-1] += np.average(loss, weights=weight[test])
        assert probe(x, y, weight, seed=seed)[0] == C_GRID[np.argmin(losses)]


def test_noise_is_regularized_more_than_a_signal():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 5)).astype(np.float32)
    signal, _ = probe(x, (x[:, 0] > 0).astype(int))
    noise, _ = probe(x, rng.integers(2, size=100))
    assert noise == C_GRID[0]
    assert signal > 100 * noise


@pytest.mark.parametrize("n_classes", [2, 3])
def test_weight_zero_equals_a_missing_sample(fixed_C, n_classes):
    x, y = make_data(n_classes)
    weight = np.arange(len(x)) % 3 + 0.5
    weight[n_classes * 2 :: 4] = 0
    _, got = probe(x, y, weight)
    head = make_head(n_classes).eval()
    kept = weight > 0
    fit_linear_probe(head, x[kept], y[kept], weight[kept])
    expected = head(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(got, log_softmax(expected, axis=1), atol=2e-3)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_weight_equals_the_number_of_repetitions(fixed_C, n_classes):
    x, y = make_data(n_classes)
    weight = np.arange(len(x)) % 4 + 1
    _, got = probe(x, y, weight)
    _, expected = probe(np.repeat(x, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_allclose(np.repeat(got, weight, axis=0), expected, atol=2e-3)


def test_larger_weight_improves_the_fit(fixed_C):
    x, y = make_data(3)
    weight = np.where(y == 1, 10, 1)
    plain, weighted = (probe(x, y, w)[1][y == 1, 1].mean() for w in (None, weight))
    assert weighted > plain


@pytest.mark.parametrize(
    ("hidden", "value"),
    [
        *(((), value) for value in (0.0, 0.1, -1e4, 1e-30)),
        ((6,), -1e4),
        *(pytest.param((6,), v, marks=pytest.mark.slow) for v in (0.0, 0.1, 1e-30)),
    ],
)
def test_constant_feature_has_no_effect(fixed_C, hidden, value):
    x, y = make_data(3)
    _, expected = probe(x, y)
    x = np.hstack([x, np.full((len(x), 2), value, np.float32)])
    _, got = probe(x, y, hidden=hidden)
    assert np.isfinite(got).all()
    if not hidden:  # initial weights of a perceptron depend on the number of features
        np.testing.assert_allclose(got, expected, atol=1e-2 if value == -1e4 else 1e-4)


@pytest.mark.parametrize("value", [1e-12, 1e-30, 1e-42])
def test_tiny_variance_is_not_scaled_up(value):
    x, y = make_data(2)
    x[:, 2] = 0
    x[3, 2] = value
    head = make_head(2)
    fit_linear_probe(head, x, y, np.ones(len(x)))
    assert head[-1].weight.abs().max() < 10
    assert head[-1].weight.isfinite().all()


def test_large_offset():
    x, y = make_data(3)
    C, expected = probe(x, y)
    shifted, got = probe(x + np.float32([0, 0, 0, 1000, 0]), y)
    assert shifted == C
    np.testing.assert_allclose(got, expected, atol=1e-2)


@pytest.mark.parametrize("hidden", WIDTHS[:2])
def test_class_with_a_single_image(hidden):
    x, y = make_data(3)
    y[y == 2] = 0
    y[5] = 2
    C, got = probe(x, y, hidden=hidden)
    assert C == C_GRID[3]
    assert np.isfinite(got).all()


def test_class_with_two_images():
    x, y = make_data(2, n=60)
    y[:] = 0
    y[[5, 40]] = 1
    C, got = probe(x, y)
    assert C in C_GRID
    assert np.isfinite(got).all()


def test_many_images_are_split_once():
    x, y = make_data(2, n=2000)
    scaled = StandardScaler().fit_transform(x)
    split = StratifiedShuffleSplit(1, test_size=0.2, random_state=1)
    (train, test), *_ = split.split(x, y)
    losses = []
    for C in C_GRID:
        fitted = LogisticRegression(C=C).fit(scaled[train], y[train])
        proba = fitted.predict_proba(scaled[test])
        losses.append(-np.log(proba[np.arange(len(test)), y[test]]).mean())
    assert probe(x, y, seed=1)[0] == C_GRID[np.argmin(losses)]


@pytest.mark.parametrize("single_split_from", [60, 2000])
@pytest.mark.parametrize("n_per_class", [2, 3, 4])
def test_many_classes_of_a_few_images(monkeypatch, n_per_class, single_split_from):
    monkeypatch.setattr(linear_probe, "_MIN_FOR_SINGLE_SPLIT", single_split_from)
    y = np.repeat(np.arange(60 // n_per_class), n_per_class)
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    C, got = probe(x, y)
    assert C in C_GRID
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    "hidden", [WIDTHS[0], pytest.param((6,), marks=pytest.mark.slow), WIDTHS[2]]
)
def test_equal_seed_gives_equal_bits_and_global_state_is_unchanged(hidden):
    x, y = make_data(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (probe(x.copy(), y, hidden=hidden, seed=5) for _ in range(2))
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    np.testing.assert_array_equal(x, make_data(3)[0])
