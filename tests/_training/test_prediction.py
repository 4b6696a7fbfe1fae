"""Tests of predictions: from a private network, without copies once rows are cached."""

import copy
import pickle

import numpy as np
import pytest
import torch
from reference import normalized
from shared_fixtures import FIXED
from sklearn.base import clone
from trainer_helpers import Y

from sktl import FineTunedCNNClassifier
from sktl._images.validation import validate_images
from sktl._inference import engines
from sktl._training import frozen_activations, initial_model, network, prediction
from sktl._training.prediction import predict_outputs
from sktl._utils.keyed_cache import KeyedCache

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


def make_classifier(**parameters):
    options = {**FIXED, "trainable": 1, "max_epochs": 1, "batch_size": 16}
    options |= {"engine": "torch"}
    options |= {"random_state": 0, **parameters}
    return FineTunedCNNClassifier("five stages", **options)


def test_outputs_equal_the_network(images):
    estimator = make_classifier(trainable="all").fit(images, Y)
    X = validate_images(images, estimator=copy.copy(estimator), reset=True)
    with torch.inference_mode():
        expected = estimator.module_(normalized(images, estimator.preprocessing_))
    got = predict_outputs(estimator, estimator._fitted_model, X)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_memory", [False, True])
@pytest.mark.parametrize("change", ["weights", "layer", "training"])
def test_predictions_do_not_depend_on_module(
    images, tmp_path, monkeypatch, use_memory, change
):
    estimator = make_classifier(memory=tmp_path if use_memory else None)
    estimator.fit(images, Y)
    second = clone(estimator).fit(images, Y)  # of equal weights
    copied = copy.deepcopy(estimator)
    other = make_classifier(memory=None).fit(images, Y)
    expected = other.predict_proba(images)
    if change == "weights":
        with torch.no_grad():
            for parameter in estimator.module_.parameters():
                parameter.mul_(2)
    elif change == "layer":
        estimator.module_[-1] = torch.nn.Flatten()
    else:
        estimator.module_.train()
    # Compile the networks again.
    monkeypatch.setattr(engines, "compiled_models", KeyedCache(max_size=4))
    for each in (
        estimator,
        second,
        copied,
        copy.deepcopy(estimator),
        pickle.loads(pickle.dumps(estimator)),
    ):
        np.testing.assert_allclose(each.predict_proba(images), expected, rtol=1e-4)
    assert not any(module.training for module in copied.module_.modules())


def test_cached_prediction_neither_copies_nor_hashes_the_network(
    images, tmp_path, monkeypatch
):
    estimator = make_classifier(memory=tmp_path).fit(images, Y)
    expected = estimator.predict_proba(images)

    def fail(*arguments, **options):
        raise AssertionError("the network was copied or hashed")

    for module in (frozen_activations, initial_model, network, prediction):
        for name in ("network_digest", "output_shape", "state_dict_digest"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(copy, "deepcopy", fail)
    monkeypatch.setattr(frozen_activations, "get_compiled_model", fail)
    np.testing.assert_array_equal(estimator.predict_proba(images), expected)
    with pytest.raises(AssertionError, match="copied or hashed"):
        estimator.predict_proba(255 - images)  # these are not cached


def test_prediction_without_memory_copies_the_network_once(images, monkeypatch):
    estimator = make_classifier(trainable="all").fit(images, Y)
    expected = estimator.predict_proba(images)

    def fail(*arguments, **options):
        raise AssertionError("the network was copied")

    monkeypatch.setattr(copy, "deepcopy", fail)
    np.testing.assert_array_equal(estimator.predict_proba(images), expected)
