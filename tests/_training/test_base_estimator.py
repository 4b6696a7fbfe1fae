"""Tests of what the fine-tuned estimators share: fitting, attributes, tags."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils import get_tags
from trainer_helpers import Y, equal_bits, make_classifier


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"trainable": "stage9"}, "one of the stages"),
        ({"hidden_layer_sizes": [0]}, "'hidden_layer_sizes' parameter must be"),
        ({"lr": 1e30, "batch_size": 8}, "loss must be finite"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_failed_first_fit_leaves_nothing_behind(images, method, parameters, reason):
    X = images.reshape(40, -1)  # rows of numbers, which define n_features_in_
    estimator = make_classifier(image_shape=images.shape[1:], **parameters)
    before = dict(vars(estimator))
    options = {"classes": [0, 1]} if method == "partial_fit" else {}
    with pytest.raises(ValueError, match=reason):
        getattr(estimator, method)(X, Y, **options)
    assert vars(estimator) == before
    assert not hasattr(estimator, "n_features_in_")
    with pytest.raises(NotFittedError):
        estimator.predict(X)


@pytest.mark.parametrize(
    "method", ["fit", pytest.param("partial_fit", marks=pytest.mark.slow)]
)
def test_failed_second_fit_keeps_the_first(images, method):
    estimator = make_classifier().fit(images, Y)
    before, expected = dict(vars(estimator)), estimator.predict_proba(images)
    estimator.set_params(lr=1e30, batch_size=8, max_epochs=4)
    with pytest.raises(ValueError, match="must be finite"):
        getattr(estimator, method)(images, Y)
    fitted = {name: value for name, value in before.items() if name.endswith("_")}
    assert fitted.items() <= vars(estimator).items()
    np.testing.assert_array_equal(estimator.predict_proba(images), expected)


def test_module_is_made_once_and_again_after_a_fit(images):
    estimator = make_classifier(max_epochs=0).fit(images, Y)
    first = estimator.module_
    assert estimator.module_ is first
    assert first is not estimator._fitted_model.network
    assert estimator.fit(images, Y).module_ is not first


def test_module_is_not_pickled(images):
    estimator = make_classifier(max_epochs=0).fit(images, Y)
    n_bytes = len(pickle.dumps(estimator))
    module = estimator.module_
    assert len(pickle.dumps(estimator)) == n_bytes
    loaded = pickle.loads(pickle.dumps(estimator))
    assert equal_bits(loaded.module_, module)


def test_fitted_attributes(images):
    estimator = make_classifier(early_stopping=True, validation_fraction=0.2)
    assert not estimator.__sklearn_is_fitted__()
    estimator.fit(images, Y)
    assert estimator.__sklearn_is_fitted__()
    rows = estimator.history_[1:]
    assert [row["epoch"] for row in estimator.history_] == [0, 1, 2, 3]
    assert estimator.n_iter_ == 3
    assert estimator.loss_curve_ == [row["train_loss"] for row in rows]
    assert estimator.validation_scores_ == [row["valid_score"] for row in rows]
    assert estimator.preprocessing_ == estimator._fitted_model.preprocessing
    estimator.set_params(early_stopping=False).fit(images, Y)
    assert estimator.validation_scores_ is None


def test_tags():
    tags = get_tags(make_classifier())
    assert tags.input_tags.three_d_array
    assert tags.input_tags.two_d_array
    assert tags.classifier_tags.poor_score


def test_partial_fit_after_early_stopping_has_no_validation_scores(images):
    estimator = make_classifier(early_stopping=True, max_epochs=1).fit(images, Y)
    assert len(estimator.validation_scores_) == 1
    estimator.set_params(early_stopping=False).partial_fit(images, Y)
    assert estimator.validation_scores_ is None
    assert "valid_score" not in estimator.history_[-1]
    assert len(estimator.loss_curve_) == estimator.n_iter_ == 2


def test_module_that_was_copied_in_inference_mode_can_be_trained(images):
    estimator = make_classifier(max_epochs=1).fit(images, Y)
    with torch.inference_mode():
        module = estimator.module_
    module(torch.zeros(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_unfitted_estimator_has_no_module():
    with pytest.raises(NotFittedError):
        make_classifier().module_  # noqa: B018
