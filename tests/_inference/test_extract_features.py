"""Features are those of PretrainedFeatures, and share its cache."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from reference import normalized

from sktl import FeatureStore, FineTunedCNNClassifier, PretrainedFeatures
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.validation import validate_images
from sktl._inference.execution import ExecutionConfig
from sktl._inference.extract_features import extract_features
from sktl._inference.model_spec import ModelSpec


def features(X, memory=None, layers=("penultimate",), pooling="avg", **options):
    backbone = load_backbone("resnet_mini")
    settings = {"batch_size": 16, "engine": "torch", **options}
    spec = ModelSpec(
        BackboneSpec.to(backbone, "DEFAULT"),
        tuple(layers),
        pooling,
        backbone.preprocessing_at(None),
        ExecutionConfig.from_estimator(PretrainedFeatures(**settings)),
    )
    X = validate_images(X, estimator=PretrainedFeatures(), reset=True)
    return extract_features(spec, X, memory)


@pytest.fixture
def passes():
    """Count the images that go through the feature extractor."""
    n_images = []
    plain_compile = ModelSpec.compile

    def counted(spec):
        network = plain_compile(spec)

        def start(pixels):
            n_images.append(len(pixels))
            return network.start(pixels)

        return SimpleNamespace(
            start=start, execution=network.execution, n_ahead=network.n_ahead
        )

    with mock.patch.object(ModelSpec, "compile", counted):
        yield n_images


@pytest.mark.filterwarnings("ignore:precision='bfloat16' is slow")
@pytest.mark.parametrize(
    ("layers", "pooling", "precision"),
    [
        (["penultimate"], "avg", "float32"),
        (["stage1", "stage3"], "max", "float32"),
        pytest.param(["stage2"], 2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_features_equal_those_of_pretrained_features(
    images, layers, pooling, precision
):
    got = features(images, layers=layers, pooling=pooling, precision=precision)
    expected = PretrainedFeatures(
        "resnet_mini",
        layer=layers,
        pooling=pooling,
        precision=precision,
        engine="torch",
        batch_size=16,
    ).transform(images)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_penultimate_features_are_the_input_of_the_last_layer(images):
    images = images[::4]
    backbone, recorded = load_backbone("resnet_mini"), []
    handle = backbone.last_linear.register_forward_pre_hook(
        lambda module, inputs: recorded.append(inputs[0])
    )
    with torch.inference_mode():
        backbone.network(normalized(images, backbone.preprocessing))
    handle.remove()
    np.testing.assert_allclose(features(images), recorded[0], rtol=1e-3, atol=1e-5)


def test_each_image_goes_through_once(images, paths, tmp_path, passes):
    first = features(paths[:32], tmp_path)
    assert sum(passes) == 32
    np.testing.assert_array_equal(features(paths[:32][::-1], tmp_path)[::-1], first)
    assert sum(passes) == 32
    features(paths, tmp_path)
    assert sum(passes) == 48  # the eight new images, in one padded batch


def test_the_cache_is_shared_with_pretrained_features(paths, tmp_path, passes):
    mine = PretrainedFeatures(
        "resnet_mini", memory=tmp_path, engine="torch", batch_size=16
    )
    expected = mine.transform(paths[:32])
    n_before = sum(passes)
    np.testing.assert_array_equal(features(paths[:32], tmp_path), expected)
    assert sum(passes) == n_before
    assert FeatureStore(tmp_path).info()["rows"] == 32
    assert len(FeatureStore(tmp_path).info()["spaces"]) == 1


@pytest.mark.usefixtures("quick_linear_probe")
@pytest.mark.parametrize("first", ["features", "classifier"])
def test_the_cache_is_shared_with_the_fine_tuned_classifier(paths, tmp_path, first):
    pretrained = PretrainedFeatures(
        "resnet_mini", memory=tmp_path, batch_size=16, engine="torch"
    )
    classifier = FineTunedCNNClassifier(
        "resnet_mini", max_epochs=0, memory=tmp_path, batch_size=16, engine="torch"
    )
    y = np.arange(16) % 2
    if first == "features":
        pretrained.transform(paths[:16])
        classifier.fit(paths[:16], y)
    else:
        classifier.fit(paths[:16], y)
        pretrained.transform(paths[:16])
    classifier.set_params(hidden_layer_sizes=4).fit(paths[:16], y)
    assert len(FeatureStore(tmp_path).info()["spaces"]) == 1
    assert FeatureStore(tmp_path).info()["rows"] == 16


def test_no_model_is_compiled_if_all_rows_are_cached(paths, tmp_path):
    expected = features(paths, tmp_path)
    with mock.patch.object(ModelSpec, "compile", None):
        np.testing.assert_array_equal(features(paths, tmp_path), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": ["stage1"]},
        {"pooling": "max"},
        {"precision": "bfloat16"},
        {"engine": "openvino"},
    ],
)
def test_settings_that_change_rows_have_their_own_namespace(paths, tmp_path, change):
    options = {"batch_size": 4, **change}
    features(paths[:4], tmp_path, batch_size=4)
    got = features(paths[:4], tmp_path, **options)
    np.testing.assert_array_equal(got, features(paths[:4], **options))
    assert len(FeatureStore(tmp_path).info()["spaces"]) == 2
