"""Tests of a fit: what it returns, and that it changes nothing else."""

import copy
import pickle

import numpy as np
import pytest
import torch
from interrupted_training import StopAt
from sklearn.base import clone
from sklearn.metrics import log_loss
from trainer_helpers import TARGETS, Y, equal_bits, make_classifier, make_estimator

from sktl._images.validation import validate_images
from sktl._training.config import score_rank
from sktl._training.fit import fit_model
from sktl._training.multiclass import encode_multiclass
from sktl._training.network import network_digest

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

NOISY = np.where(np.arange(40) % 7 == 3, 1 - Y, Y)


def fit(estimator, images, fitted=None, *, partial=False):
    X = validate_images(images, estimator=copy.copy(estimator), reset=True)
    targets = encode_multiclass(len(X), Y, None, class_weight=None, estimator=estimator)
    return fit_model(estimator, X, targets, fitted, partial=partial)


def test_fit_model_returns_the_model_and_changes_nothing_else(images):
    estimator = make_classifier(trainable=1)
    before = dict(vars(estimator))
    fitted, record, net = fit(estimator, images)
    assert vars(estimator) == before
    assert equal_bits(fitted.network, clone(estimator).fit(images, Y).module_)
    assert fitted.digest == network_digest(fitted.network)
    assert fitted.prefix.n_parts == net.module_.partially_frozen.n_frozen == 1
    assert [row["epoch"] for row in record.history] == [0, 1, 2, 3]


def test_fit_model_does_not_change_the_model_that_it_continues(images):
    estimator = make_classifier().fit(images, Y)
    first, *_ = fit(estimator, images)
    weights = copy.deepcopy(first.network.state_dict())
    second, *_ = fit(estimator, images, first)
    assert not equal_bits(second.network, first.network)
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, weights[name])


def test_samples_of_weight_zero_are_left_out(images):
    estimator = make_classifier()
    X = validate_images(images, estimator=copy.copy(estimator), reset=True)
    weight = (np.arange(40) % 4 > 0).astype(float)
    options = {"class_weight": None, "estimator": estimator}
    targets = encode_multiclass(40, Y, weight, **options)
    got, *_ = fit_model(estimator, X, targets, None, partial=False)
    kept = np.flatnonzero(weight)
    targets = encode_multiclass(30, Y[kept], None, **options)
    subset = X.subset(kept.tolist())
    expected, *_ = fit_model(estimator, subset, targets, None, partial=False)
    assert equal_bits(got.network, expected.network)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {}),
        pytest.param("adamw", {"unfreeze_every": 2}, marks=pytest.mark.slow),
        ("adamw", {}),
    ],
)
def test_warm_start_continues_up_to_more_epochs(images, optimizer, options):
    """As of scikit-learn's ensembles, the result is that of one longer fit."""
    estimator = make_classifier(
        "five stages",
        optimizer=optimizer,
        lr_schedule="constant",
        warm_start=True,
        dropout=0.2,
        **options,
    )
    expected = clone(estimator).set_params(max_epochs=5).fit(images, Y)
    estimator.fit(images, Y)
    before = list(estimator.history_)
    estimator.set_params(max_epochs=5).fit(images, Y)
    assert estimator.history_ == expected.history_
    assert estimator.history_[:4] == before
    assert len(estimator.loss_curve_) == estimator.n_iter_ == 5
    assert equal_bits(estimator.module_, expected.module_)
    estimator.fit(images, Y)  # completed: as many epochs more
    assert [row["epoch"] for row in estimator.history_] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("target", ["several labels", "numbers"])
def test_warm_start_of_each_kind_of_target(images, target):
    y = TARGETS[target]
    options = {"lr_schedule": "constant", "warm_start": True, "max_epochs": 1}
    estimator = make_estimator(target, **options).fit(images, y)
    expected = clone(estimator).set_params(max_epochs=2).fit(images, y)
    estimator.set_params(max_epochs=2).fit(images, y)
    assert estimator.history_ == expected.history_
    assert equal_bits(estimator.module_, expected.module_)


def test_warm_start_with_early_stopping(images):
    estimator = make_classifier(
        early_stopping=True, n_iter_no_change=2, max_epochs=9, warm_start=True, lr=0.1
    ).fit(images, NOISY)
    first, scores = estimator.n_iter_, estimator.validation_scores_
    assert first < 9  # it was stopped
    estimator.set_params(max_epochs=20, lr=1e-3).fit(images, NOISY)
    assert estimator.n_iter_ >= first + 2
    assert estimator.validation_scores_[:first] == scores
    ranks = [score_rank(row) for row in estimator.history_]
    assert estimator.best_epoch_ == ranks.index(max(ranks))


@pytest.mark.parametrize("first", [{}, {"early_stopping": False}])
def test_warm_start_compares_scores_of_one_kind(images, first):
    """The best epoch so far is scored again, by `scoring` and on `X_val`."""
    options = {"lr": 0.01, "max_epochs": 2, "warm_start": True, "early_stopping": True}
    estimator = make_classifier(**{**options, **first}).fit(images, NOISY)
    estimator.set_params(max_epochs=4, scoring="loss", early_stopping=True)
    X_val, y_val = images[::3], NOISY[::3]
    before = log_loss(y_val, estimator.predict_proba(X_val))
    estimator.fit(images, NOISY, X_val=X_val, y_val=y_val)
    losses = [before, *(row["valid_loss"] for row in estimator.history_[3:])]
    assert np.argmin(losses) > 0
    assert estimator.best_epoch_ == 2 + np.argmin(losses)
    after = log_loss(y_val, estimator.predict_proba(X_val))
    assert after == pytest.approx(min(losses), rel=1e-4)


def test_interrupted_warm_start_is_resumed(images, tmp_path):
    def start(checkpoint=None):
        estimator = make_classifier(warm_start=True, random_state=0).fit(images, Y)
        return pickle.loads(pickle.dumps(estimator)).set_params(
            max_epochs=6, checkpoint=checkpoint
        )

    expected = start().fit(images, Y)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path).set_params(callbacks=[StopAt(2)]).fit(images, Y)
    resumed = start(tmp_path).fit(images, Y)
    assert resumed.history_ == expected.history_
    assert equal_bits(resumed.module_, expected.module_)
