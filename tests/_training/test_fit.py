"""Tests of a fit: what it returns, and that it changes nothing else."""

import copy

import numpy as np
import pytest
import torch
from sklearn.base import clone
from trainer_helpers import Y, equal_bits, make_classifier

from sktl._images.validation import validate_images
from sktl._training.fit import fit_model
from sktl._training.multiclass import encode_multiclass
from sktl._training.network import network_digest

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


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
    estimator = make_classifier()
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
