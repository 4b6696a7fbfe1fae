"""Tests of frozen activations: equal to torch, computed once per image."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import ImageOps
from reference import normalized
from shared_fixtures import FIXED
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold

import sktl._inference.cached_forward
from sktl import FeatureStore, FineTunedCNNClassifier, PretrainedFeatures
from sktl._backbones.new_head import replace_head
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.augmentation import augmentation_for
from sktl._images.validation import validate_images
from sktl._inference import engines
from sktl._inference.execution import ExecutionConfig
from sktl._training import frozen_activations
from sktl._training.datasets import ActivationDataset, ImageDataset
from sktl._training.decoded_images import DecodedImages
from sktl._training.frozen_activations import FrozenActivations
from sktl._training.initial_model import FrozenPrefix, PretrainedPrefix
from sktl._utils.keyed_cache import KeyedCache

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

Y = np.arange(40) % 2
NAME = "five stages"
BACKBONE = load_backbone(NAME)


@pytest.fixture
def passes():
    """Return a list of the number of images of each batch of the frozen prefix."""
    n_images = []
    plain = sktl._inference.cached_forward.batches

    def counted(*arguments, **options):
        for positions, out in plain(*arguments, **options):
            n_images.append(len(positions))
            yield positions, out

    with (
        mock.patch("sktl._inference.cached_forward.batches", counted),
        mock.patch("sktl._inference.forward.batches", counted),
    ):
        yield n_images


def make_classifier(**parameters):
    defaults = {**FIXED, "trainable": 1, "max_epochs": 2, "batch_size": 16}
    defaults |= {"lr": 1e-3}
    defaults |= {"engine": "torch", "random_state": 0, **parameters}
    return FineTunedCNNClassifier(NAME, **defaults)


def make_activations(
    X, memory=None, network=None, prefix=None, backbone=BACKBONE, **parameters
):
    estimator = PretrainedFeatures(engine="torch", batch_size=16, **parameters)
    return FrozenActivations(
        network or replace_head(backbone, 2),
        validate_images(X, estimator=estimator, reset=True),
        backbone.preprocessing,
        ExecutionConfig.from_estimator(estimator),
        pretrained=PretrainedPrefix(3, BackboneSpec.to(backbone, "DEFAULT")),
        prefix=prefix,
        memory=memory,
    )


def assert_equal_weights(first, second):
    for name, value in first.module_.state_dict().items():
        assert torch.equal(value, second.module_.state_dict()[name]), name
    assert first.history_ == second.history_


@pytest.mark.parametrize("max_bytes", [2**30, 0])
@pytest.mark.parametrize("n_frozen", [1, 2, 3])
def test_rows_equal_the_output_of_the_stages(images, monkeypatch, max_bytes, n_frozen):
    monkeypatch.setattr(frozen_activations, "_MAX_BYTES_IN_MEMORY", max_bytes)
    network = replace_head(BACKBONE, 2).eval()
    got = make_activations(images, network=network).rows(n_frozen, [3, 39, 3])
    selected = validate_images(images[[3, 39, 3]], estimator=network, reset=True)
    with torch.no_grad():
        expected = network[:n_frozen](normalized(selected, BACKBONE.preprocessing))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trainable", "options"),
    [
        (1, {"early_stopping": True}),
        *(
            pytest.param(trainable, options, marks=pytest.mark.slow)
            for trainable, options in [
                ("head", {}),
                ("head", {"early_stopping": True}),
                ("head", {"dropout": 0.5}),
                (1, {}),
                (1, {"dropout": 0.5}),
                (2, {}),
                (2, {"early_stopping": True}),
                (2, {"dropout": 0.5}),
            ]
        ),
    ],
)
def test_weights_have_equal_bits_with_every_cache(
    paths, tmp_path, monkeypatch, trainable, options
):
    estimator = make_classifier(trainable=trainable, **options)
    expected = clone(estimator).fit(paths, Y)
    cached = clone(estimator).set_params(memory=tmp_path)
    assert_equal_weights(clone(cached).fit(paths, Y), expected)  # empty cache
    monkeypatch.setattr(frozen_activations, "_MAX_BYTES_IN_MEMORY", 0)
    assert_equal_weights(
        clone(estimator).fit(paths, Y), expected
    )  # computed in each epoch
    assert_equal_weights(clone(cached).fit(paths, Y), expected)  # read from it
    FeatureStore(tmp_path).clear()
    assert_equal_weights(clone(cached).fit(paths, Y), expected)  # written and read


@pytest.mark.slow
def test_activations_of_tokens_are_cached(images, tmp_path, passes):
    pytest.importorskip("timm")
    estimator = make_classifier(trainable=2, head_init="random", max_epochs=1)
    estimator.set_params(backbone="timm/test_vit", weights=None, image_size=48)
    X, y = images[:8], Y[:8]
    expected = clone(estimator).fit(X, y)
    passes.clear()
    for _ in range(2):  # with an empty cache, and from it
        cached = clone(estimator).set_params(memory=tmp_path).fit(X, y)
        assert_equal_weights(cached, expected)
        assert sum(passes) == 8
    (namespace,) = namespaces(tmp_path)
    assert (namespace["space"]["layer"], namespace["rows"]) == ("stage2", 8)
    initial = clone(estimator).set_params(max_epochs=0).fit(X, y)
    before, after = initial.module_.state_dict(), expected.module_.state_dict()
    changed = {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"stage3", "stage4", "head"}


def test_training_on_activations_equals_training_on_pixels(paths, monkeypatch):
    got = make_classifier(lr=1e-2, optimizer="sgd").fit(paths, Y)
    monkeypatch.setattr(
        "sktl._training.training_sets.ActivationDataset", lambda pixels, _: pixels
    )
    expected = make_classifier(lr=1e-2, optimizer="sgd").fit(paths, Y)
    for name, value in expected.module_.state_dict().items():
        other = got.module_.state_dict()[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trainable", ["head", 1])
@pytest.mark.parametrize("max_bytes", [2**30, pytest.param(0, marks=pytest.mark.slow)])
def test_search_computes_each_image_once(
    paths, tmp_path, passes, monkeypatch, trainable, max_bytes
):
    monkeypatch.setattr(frozen_activations, "_MAX_BYTES_IN_MEMORY", max_bytes)
    search = GridSearchCV(
        make_classifier(
            trainable=trainable, head_init="random", memory=tmp_path, max_epochs=1
        ),
        {"lr": [1e-3, 1e-4], "hidden_layer_sizes": [(), (4,)]},
        cv=StratifiedKFold(2, shuffle=True, random_state=0),
    )
    search.fit(paths, Y)
    assert sum(passes) == 40
    search.fit(paths, Y)
    search.predict(paths)
    assert sum(passes) == 40


def test_linear_probe_needs_a_second_pass_unless_only_the_head_is_trained(
    paths, tmp_path, passes
):
    make_classifier(trainable="head", memory=tmp_path).fit(paths, Y)
    assert sum(passes) == 40
    make_classifier(trainable=1, memory=tmp_path).fit(
        paths, Y
    )  # the features are cached
    assert sum(passes) == 80
    layers = {s["space"]["layer"] for s in namespaces(tmp_path)}
    assert layers == {"penultimate", "stage3"}


def namespaces(directory):
    return FeatureStore(directory).info()["spaces"].values()


def test_rows_are_shared_with_pretrained_features(paths, tmp_path, passes):
    features = PretrainedFeatures(
        NAME, layer="stage2", pooling="flatten", batch_size=16, engine="torch"
    )
    flat = features.set_params(memory=tmp_path).transform(paths)
    rows = make_activations(paths, tmp_path).rows(3, range(40))
    np.testing.assert_array_equal(rows.flatten(1), flat)
    assert sum(passes) == 40


def test_frozen_depth_decreases_as_stages_are_unfrozen(paths, tmp_path):
    estimator = make_classifier(trainable="all", unfreeze_every=1, max_epochs=6)
    expected = clone(estimator).fit(paths, Y)
    got = clone(estimator).set_params(memory=tmp_path).fit(paths, Y)
    assert_equal_weights(got, expected)
    layers = {s["space"]["layer"] for s in namespaces(tmp_path)}
    assert layers == {"stem", "stage1", "stage2", "stage3", "penultimate"}


def test_predictions_use_the_cached_activations(paths, tmp_path, passes):
    plain = make_classifier().fit(paths, Y)
    estimator = make_classifier(memory=tmp_path).fit(paths, Y)
    n_before = sum(passes)
    got = estimator.predict_proba(paths[::-1])
    assert sum(passes) == n_before
    np.testing.assert_allclose(got, plain.predict_proba(paths[::-1]), rtol=1e-4)
    single = estimator.predict_proba(paths[3:4])
    np.testing.assert_allclose(single[0], got[::-1][3], rtol=1e-4)


def test_limit_of_the_store_does_not_change_the_weights(paths, tmp_path):
    estimator = make_classifier(weights=None, trainable="all", batch_size=8)
    expected = clone(estimator).fit(paths, Y)
    store = FeatureStore(tmp_path, max_bytes=10**9)
    assert_equal_weights(estimator.set_params(memory=store).fit(paths, Y), expected)


def test_changes_of_module_do_not_reach_the_cache(paths, tmp_path, monkeypatch):
    estimator = make_classifier(trainable="head", memory=tmp_path).fit(
        paths[:20], Y[:20]
    )
    with torch.no_grad():
        for parameter in estimator.module_.parameters():
            parameter.mul_(2)
    monkeypatch.setattr(engines, "compiled_models", KeyedCache(max_size=4))
    estimator.module_.train()
    estimator.predict(paths[20:])
    assert estimator.module_[0].training
    features = PretrainedFeatures(NAME, batch_size=16, engine="torch")
    expected = clone(features).transform(paths)
    got = features.set_params(memory=tmp_path).transform(paths)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_warm_start_and_partial_fit_use_the_cached_activations(paths, tmp_path, passes):
    estimator = make_classifier(trainable=1, memory=tmp_path, warm_start=True).fit(
        paths, Y
    )
    n_before = sum(passes)
    estimator.fit(paths, Y).partial_fit(paths, Y).predict(paths)
    assert sum(passes) == n_before


def test_trained_stages_have_other_activations(paths, tmp_path, passes):
    estimator = make_classifier(trainable=2, memory=tmp_path, warm_start=True).fit(
        paths, Y
    )
    n_before = sum(passes)
    estimator.set_params(trainable=1).fit(paths, Y)  # stage3 was trained
    assert sum(passes) > n_before
    expected = estimator.set_params(memory=None).predict_proba(paths)
    np.testing.assert_allclose(
        estimator.set_params(memory=tmp_path).predict_proba(paths), expected, rtol=1e-3
    )


def test_activations_larger_than_the_store_are_not_cached(paths, tmp_path, capsys):
    store = FeatureStore(tmp_path, max_bytes=1_000)
    estimator = make_classifier(head_init="random", memory=store, verbose=1)
    expected = make_classifier(head_init="random").fit(paths, Y)
    assert_equal_weights(estimator.fit(paths, Y), expected)
    assert store.info()["rows"] == 0
    message = capsys.readouterr().err
    assert "activations of 40 images after stage3 of five stages" in message
    assert "more than its max_bytes: they are not cached" in message


def test_reported_size_is_the_size_on_disk(paths, tmp_path, capsys):
    activations = make_activations(
        paths, tmp_path, backbone=load_backbone("resnet_mini"), verbose=1
    )
    activations.compute(3)
    reported = float(capsys.readouterr().err.split(" MB")[0].split()[-1])
    limit = activations.max_bytes(3)
    assert abs(reported * 1e6 - limit) < 1e5
    on_disk = FeatureStore(tmp_path).info()["bytes"]
    assert 0.9 * limit < on_disk < 1.05 * limit


def test_augmented_images_are_not_cached(paths, tmp_path, passes):
    estimator = make_classifier(
        augmentation="flip", head_init="random", memory=tmp_path
    )
    estimator.fit(paths, Y)
    assert not passes
    assert FeatureStore(tmp_path).info()["rows"] == 0


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"early_stopping": True}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("trainable", [pytest.param("head", marks=pytest.mark.slow), 1])
def test_fixed_views_have_equal_bits_with_every_cache(
    paths, tmp_path, monkeypatch, trainable, options
):
    estimator = make_classifier(trainable=trainable, augmentation="standard", **options)
    estimator.set_params(augmentation_views=2)
    expected = clone(estimator).fit(paths, Y)
    cached = clone(estimator).set_params(memory=tmp_path)
    assert_equal_weights(clone(cached).fit(paths, Y), expected)
    monkeypatch.setattr(frozen_activations, "_MAX_BYTES_IN_MEMORY", 0)
    assert_equal_weights(clone(estimator).fit(paths, Y), expected)
    assert_equal_weights(clone(cached).fit(paths, Y), expected)


def test_training_on_activations_of_views_equals_training_on_views(paths, monkeypatch):
    estimator = make_classifier(
        lr=1e-2, optimizer="sgd", augmentation="standard", max_epochs=3
    )
    got = estimator.set_params(augmentation_views=2).fit(paths, Y)
    monkeypatch.setattr(
        "sktl._training.training_sets.ActivationDataset", lambda pixels, _: pixels
    )
    expected = clone(estimator).fit(paths, Y)
    for name, value in expected.module_.state_dict().items():
        other = got.module_.state_dict()[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)
    others = clone(estimator).set_params(augmentation_views=1).fit(paths, Y)
    assert not torch.equal(others.module_[-1][-1].weight, got.module_[-1][-1].weight)


def test_views_of_another_augmentation_are_not_read_from_the_cache(paths, tmp_path):
    for augmentation in ("flip", "standard"):
        estimator = make_classifier(augmentation=augmentation, augmentation_views=2)
        estimator.set_params(head_init="random")
        expected = clone(estimator).fit(paths, Y)
        assert_equal_weights(
            estimator.set_params(memory=tmp_path).fit(paths, Y), expected
        )


def test_search_computes_each_view_once(paths, tmp_path, passes):
    estimator = make_classifier(
        augmentation="trivial", augmentation_views=2, max_epochs=2
    )
    estimator.set_params(head_init="random", memory=tmp_path)
    search = GridSearchCV(estimator, {"lr": [1e-3, 1e-4]}, cv=2).fit(paths, Y)
    # Two views of each image for training, and the plain image for the score.
    assert sum(passes) == 3 * 40
    search.fit(paths, Y)
    search.predict(paths)
    assert sum(passes) == 3 * 40


@pytest.mark.parametrize(
    "options", [{"random_state": None}, {"augmentation": ImageOps.mirror}]
)
def test_views_that_are_not_reproducible_are_not_cached(paths, tmp_path, options):
    estimator = make_classifier(
        augmentation="flip", augmentation_views=2, head_init="random"
    )
    estimator.set_params(memory=tmp_path, **options).fit(paths, Y)
    assert FeatureStore(tmp_path).info()["rows"] == 0


def test_invalid_image(paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    X = [*paths[:20], str(tmp_path / "bad.png"), *paths[20:39]]
    with pytest.raises(ValueError, match=r"X\[20\].*bad\.png"):
        make_classifier(head_init="random").fit(X, Y)


def test_dataset_yields_pixels_while_nothing_is_frozen(images):
    X = validate_images(images, estimator=PretrainedFeatures(), reset=True)
    preprocessing = BACKBONE.preprocessing
    decoded = DecodedImages(
        X, augmentation_for(None, preprocessing), preprocessing.crop_size
    )
    pixels = ImageDataset(decoded, np.arange(40), Y, np.ones(40), n_jobs=1)
    dataset = ActivationDataset(pixels, make_activations(images))
    assert len(dataset) == 40
    (x, (y, weight)), _ = dataset.batches(range(40), 2)
    assert x.dtype == torch.uint8
    dataset.set_frozen_depth(3)
    (rows, (same, _)), _ = dataset.batches(range(40), 2)
    assert rows.dtype == torch.float32
    assert len(x) == len(rows) == len(weight) == 20
    assert torch.equal(y, same)


def test_outputs_equal_those_of_the_network(images):
    network = replace_head(BACKBONE, 2).eval()
    activations = make_activations(images, network=network)
    with torch.no_grad():
        expected = network[3:](activations.rows(3, range(40)))
    np.testing.assert_allclose(activations.outputs(3), expected, rtol=1e-4, atol=1e-5)


def test_shape_and_digest_of_a_fitted_prefix_are_not_computed(
    images, tmp_path, monkeypatch
):
    network = replace_head(BACKBONE, 2).eval()
    shape = (12, 2, 2)  # of stage3 for images of 32 x 32
    prefix = FrozenPrefix(4, "digest of the prefix", shape)
    expected = make_activations(images, network=network).rows(4, [0, 1])
    for name in ("network_digest", "output_shape"):
        monkeypatch.setattr(frozen_activations, name, None)
    activations = make_activations(images, tmp_path, network, prefix)
    got = activations.rows(4, [0, 1])
    assert got.shape[1:] == shape
    torch.testing.assert_close(got, expected)
    (namespace,) = namespaces(tmp_path)
    assert namespace["space"]["weights"] == prefix.digest
