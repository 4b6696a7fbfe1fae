"""Saved files as weights, compared with the estimators that saved them."""

import numpy as np
import pytest
import torch
from conftest import FIXED
from reference import normalized

from sktl import (
    FineTunedCNNClassifier,
    PretrainedClassifier,
    PretrainedFeatures,
)

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

LABELS = np.array(["wasp", "ant", "bee"])


def fit(images, backbone="five stages", labels=LABELS, **parameters):
    options = {**FIXED, "max_epochs": 1, "lr": 0.05, "random_state": 0, **parameters}
    y = np.asarray(labels)[np.arange(len(images)) % len(labels)]
    return FineTunedCNNClassifier(backbone, **options).fit(images, y)


@pytest.fixture(scope="module")
def tuned(images):
    options = {"image_size": 40, "resize": "squash", "label_smoothing": 0.1}
    return fit(images, hidden_layer_sizes=(8, 6), dropout=0.3, **options)


@pytest.fixture
def file(tuned, tmp_path):
    tuned.save(tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def test_penultimate_features_and_last_layer_give_the_logits(tuned, file, images):
    features = PretrainedFeatures(weights=file).fit_transform(images)
    last = tuned.module_.head[-1]
    with torch.inference_mode():
        logits = last(torch.from_numpy(features))
    assert features.shape == (40, 6)
    np.testing.assert_allclose(logits, tuned.decision_function(images), atol=1e-5)


def test_stages_are_the_fine_tuned_ones(tuned, file, images):
    x = normalized(images, tuned.preprocessing_)
    for n_stages, layer in ((1, "stem"), (4, "stage3"), (5, "stage4")):
        with torch.inference_mode():
            expected = tuned.module_[:n_stages](x).flatten(1)
        mine = PretrainedFeatures(weights=file, layer=layer, pooling="flatten")
        np.testing.assert_allclose(mine.transform(images), expected, atol=1e-5)
    names = PretrainedFeatures(weights=file).fit(images).get_feature_names_out()
    assert names[0] == "five stages_penultimate_0"


@pytest.mark.parametrize("layer", ["stage3.0", "head.0"])
def test_modules_have_the_names_of_the_fitted_network(tuned, file, images, layer):
    rows = []
    module = tuned.module_.get_submodule(layer)
    hook = module.register_forward_hook(lambda *each: rows.append(each[-1]))
    with torch.inference_mode():
        tuned.module_(normalized(images, tuned.preprocessing_))
    hook.remove()
    mine = PretrainedFeatures(weights=file, layer=layer, pooling="flatten")
    np.testing.assert_allclose(
        mine.transform(images), rows[0].flatten(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "labels", [LABELS, [10, 9, 2], [2.0, -1.0], [False, True], [10, 9, 100]]
)
def test_classifier_predicts_the_labels_of_the_fine_tuning(images, tmp_path, labels):
    file = tmp_path / "tuned.safetensors"
    estimator = fit(images, labels=labels)
    estimator.save(file)
    mine = PretrainedClassifier(weights=str(file)).fit(images)
    loaded = FineTunedCNNClassifier.load(file)
    np.testing.assert_array_equal(mine.classes_, loaded.classes_)
    assert mine.classes_.dtype == loaded.classes_.dtype
    proba = mine.predict_proba(images)
    np.testing.assert_allclose(proba, loaded.predict_proba(images), atol=1e-5)
    np.testing.assert_array_equal(mine.predict(images), loaded.predict(images))
    label_map = {label: str(label) for label in labels[:2]}
    mapped = PretrainedClassifier(weights=file, label_map=label_map).fit(images)
    assert set(mapped.classes_) == {str(label) for label in labels[:2]}
