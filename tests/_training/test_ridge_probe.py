"""Tests of the ridge probe: equal to the model of scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_linear_probe import make_head

from sktl._training import linear_probe
from sktl._training.ridge_probe import ALPHA_GRID, fit_ridge_probe


def make_data(n_outputs=2, n=60, noise=3.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5))
    y = x @ rng.normal(size=(5, n_outputs)) + noise * rng.normal(size=(n, n_outputs))
    x = x * [1, 10, 0.01, 3, 0.5] + [0, 100, 1, -7, 2]
    return x.astype(np.float32), (y / y.std(axis=0)).astype(np.float32)


def squared(outputs, y):
    return ((outputs - y) ** 2).mean(axis=1)


def probe(x, y, weight=None, hidden=(), losses=squared, groups=None):
    """Return the selected strength and the outputs of the head."""
    weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
    head = make_head(y.shape[1], hidden, x.shape[1]).eval()
    alpha = fit_ridge_probe(
        head, x, y, weight, losses, groups=groups, hidden_layer_sizes=hidden
    )
    with torch.no_grad():
        return alpha, head(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_outputs_equal_those_of_ridge(n_outputs, weighted):
    x, y = make_data(n_outputs)
    weight = np.random.default_rng(1).uniform(0.2, 3, 60) if weighted else np.ones(60)
    weight /= weight.mean()
    alpha, outputs = probe(x, y, weight)
    scaled = StandardScaler().fit(x, sample_weight=weight).transform(x)
    expected = Ridge(alpha=alpha).fit(scaled, y, sample_weight=weight).predict(scaled)
    np.testing.assert_allclose(outputs, expected.reshape(outputs.shape), atol=2e-5)


@pytest.mark.parametrize("n", [30, 2001])
@pytest.mark.parametrize("noise", [0.0, 1.0, 1000.0])
def test_strength_is_that_of_a_grid_search(n, noise):
    x, y = make_data(n=n, noise=noise)
    split = (
        KFold(5, shuffle=True, random_state=0)
        if n < 2000
        else ShuffleSplit(1, test_size=0.2, random_state=0)
    )
    scaled = StandardScaler().fit_transform(x.astype(float))
    search = GridSearchCV(
        Ridge(), {"alpha": ALPHA_GRID}, scoring="neg_mean_squared_error", cv=split
    ).fit(scaled, y)
    assert probe(x, y)[0] == pytest.approx(search.best_params_["alpha"])


def test_strength_minimizes_the_given_loss():
    x, y = make_data()
    worst_is_best = [lambda outputs, y: -squared(outputs, y), squared]
    strengths = [probe(x, y, losses=losses)[0] for losses in worst_is_best]
    assert strengths[0] != strengths[1]


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_hidden_layers_equal_the_perceptron(n_outputs, monkeypatch):
    monkeypatch.setattr("sktl._training.ridge_probe.ALPHA_GRID", np.array([0.5]))
    monkeypatch.setattr(linear_probe, "_N_FOLDS", 2)
    x, y = make_data(n_outputs)
    _, outputs = probe(x, y, hidden=(6,))
    model = MLPRegressor(
        hidden_layer_sizes=(6,), solver="lbfgs", alpha=0.5, random_state=0
    )
    model = make_pipeline(StandardScaler(), model)
    expected = model.fit(x.astype(float), y if n_outputs > 1 else y[:, 0]).predict(x)
    np.testing.assert_allclose(outputs, expected.reshape(outputs.shape), atol=1e-3)


def test_strength_is_selected_on_other_groups():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 30)).repeat(5, axis=0) + rng.normal(0, 0.01, (200, 30))
    y = rng.normal(size=(40, 1)).repeat(5, axis=0)  # by chance
    groups = np.arange(40).repeat(5)
    alone, together = (
        probe(x.astype("f4"), y, groups=each)[0] for each in (None, groups)
    )
    assert alone < 10 < 100 <= together
    assert probe(x.astype("f4"), y, groups=groups * 0)[0] == ALPHA_GRID[4]  # no folds


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("n_features", [1, 50])
def test_few_images(n, n_features):
    x = np.random.default_rng(0).normal(size=(n, n_features)).astype("f4")
    y = np.arange(n, dtype="f4")[:, None]
    _, outputs = probe(x, y)
    assert np.isfinite(outputs).all()
    assert outputs.mean() == pytest.approx(y.mean(), abs=1e-5)


def test_targets_of_zero_give_outputs_of_zero():
    x, y = make_data()
    assert not probe(x, np.zeros_like(y))[1].any()
