"""Tests of the linear probe of several labels: equal to models of scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from test_linear_probe import make_head

from sktl._training import linear_probe
from sktl._training.multilabel_probe import fit_multilabel_probe


def make_data(n=80, n_labels=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5))
    y = x @ rng.normal(size=(5, n_labels)) + rng.logistic(size=(n, n_labels)) > 0
    return (x * [1, 10, 0.01, 3, 0.5] + 7).astype("f4"), y.astype(np.uint8)


def probe(x, y, weight=None, class_weights=None, hidden=(), groups=None):
    """Return the logits of the head."""
    weight = np.ones(len(x)) if weight is None else weight
    if class_weights is None:
        class_weights = np.ones((y.shape[1], 2))
    head = make_head(y.shape[1], hidden, x.shape[1]).eval()
    fit_multilabel_probe(
        head, x, y, weight, class_weights, groups=groups, hidden_layer_sizes=hidden
    )
    with torch.no_grad():
        return head(torch.from_numpy(x)).numpy()


@pytest.fixture
def fixed_C(monkeypatch):
    monkeypatch.setattr(linear_probe, "C_GRID", np.array([0.3]))
    return 0.3


@pytest.mark.parametrize("weighted", [False, True])
def test_one_logistic_regression_per_label(fixed_C, weighted):
    x, y = make_data()
    weight, class_weights = np.ones(80), np.ones((3, 2))
    if weighted:
        weight = np.random.default_rng(1).uniform(0.2, 3, 80)
        weight /= weight.mean()
        class_weights = np.array([[1.0, 5.0], [2.0, 1.0], [0.5, 0.5]])
    scaled = StandardScaler().fit(x, sample_weight=weight).transform(x)
    logits = probe(x, y, weight, class_weights)
    for column, label, weights in zip(logits.T, y.T, class_weights, strict=True):
        own = weight * weights[label]
        model = LogisticRegression(C=fixed_C, max_iter=1000)
        model.fit(scaled, label, sample_weight=own / own.mean())
        np.testing.assert_allclose(column, model.decision_function(scaled), atol=2e-3)


def test_each_label_has_its_own_strength(monkeypatch):
    monkeypatch.setattr(linear_probe, "C_GRID", linear_probe.C_GRID[::2])
    x, y = make_data(200, 1)
    noise = np.random.default_rng(5).integers(2, size=(200, 1))
    both = probe(x, np.hstack([y, noise]))
    alone = [
        probe(x, np.hstack([label, label])) for label in (y, noise.astype(np.uint8))
    ]
    np.testing.assert_array_equal(both[:, 0], alone[0][:, 0])
    np.testing.assert_array_equal(both[:, 1], alone[1][:, 0])
    assert both[:, 0].std() > 10 * both[:, 1].std()


@pytest.mark.usefixtures("quick_linear_probe")
def test_labels_that_never_or_always_occur_get_a_constant():
    x, y = make_data()
    y[:, 0], y[:, 2] = 0, 1
    logits = probe(x, y)
    np.testing.assert_allclose(expit(logits[:, 0]), 0.5 / 81, rtol=1e-5)
    np.testing.assert_allclose(expit(logits[:, 2]), 80.5 / 81, rtol=1e-5)
    others = probe(x, y[:, [1, 1]])
    np.testing.assert_array_equal(logits[:, 1], others[:, 0])


@pytest.mark.usefixtures("quick_linear_probe")
@pytest.mark.parametrize("hidden", [(), (3,)])
def test_strengths_are_selected_on_other_groups(hidden):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 30)).repeat(5, axis=0) + rng.normal(0, 0.01, (200, 30))
    y = rng.permutation(np.arange(80).reshape(40, 2) % 3 == 0).repeat(5, axis=0)
    groups, weights = np.arange(40).repeat(5), np.array([[1, 1], [1, 0.5]])
    alone, together = (
        np.abs(probe(x.astype("f4"), y, None, weights, hidden, each)).max(axis=0)
        for each in (None, groups)
    )
    assert (together < alone / 2).all()  # a strong regularization


@pytest.mark.parametrize("n_positive", [1, 2, 4])
def test_rare_labels(monkeypatch, n_positive):
    monkeypatch.setattr(linear_probe, "C_GRID", np.array([0.01, 1.0]))
    x, y = make_data()
    y[:, 1] = np.arange(80) < n_positive
    assert np.isfinite(probe(x, y)).all()


def test_class_weight_of_zero_leaves_one_class():
    x, y = make_data()
    logits = probe(x, y, class_weights=np.array([[1.0, 0.0], [1, 1], [0, 1]]))
    n_absent = (1 - y[:, 0]).sum()
    np.testing.assert_allclose(expit(logits[:, 0]), 0.5 / (n_absent + 1), rtol=1e-5)
    assert (logits[:, 2] > 0).all()


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_hidden_layers_equal_the_perceptron(fixed_C, monkeypatch):
    monkeypatch.setattr(linear_probe, "_N_FOLDS", 2)
    x, y = make_data()
    y[:, 1] = 0
    scaled = StandardScaler().fit_transform(x.astype(float))
    model = MLPClassifier(
        (4,), solver="lbfgs", alpha=1 / fixed_C, max_iter=200, random_state=0
    ).fit(scaled, y)
    proba = expit(probe(x, y, hidden=(4,)))
    np.testing.assert_allclose(proba, model.predict_proba(scaled), atol=1e-3)
