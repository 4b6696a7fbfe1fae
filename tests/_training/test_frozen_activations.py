"""What leaves the frozen part: what torch gives, and once per image."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import ImageOps
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold

import sktl._inference.cached_forward
from sktl import FeatureStore, FineTunedCNNClassifier, PretrainedFeatures
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.augmentation import augmentation_for
from sktl._images.validation import validate_images
from sktl._inference.execution import ExecutionConfig
from sktl._training import frozen_activations as activations_room
from sktl._training.datasets import ImageDataset
from sktl._training.frozen_activations import ActivationDataset, FrozenActivations
from sktl._training.network import replace_head

Y = np.arange(40) % 2
BACKBONE = load_backbone("resnet_mini")


@pytest.fixture
def passes():
    """List how many images go through the frozen part, call by call."""
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


def classifier(**parameters):
    given = {"trainable": 1, "max_epochs": 2, "batch_size": 16, "lr": 1e-3}
    given |= {"engine": "torch", "random_state": 0, **parameters}
    return FineTunedCNNClassifier("resnet_mini", **given)


def build_frozen_activations(X, memory=None, network=None, **parameters):
    mine = PretrainedFeatures(engine="torch", batch_size=16, **parameters)
    return FrozenActivations(
        network or replace_head(BACKBONE, 2),
        validate_images(X, estimator=mine, reset=True),
        BACKBONE.preprocessing,
        ExecutionConfig.from_estimator(mine),
        pretrained=(3, BackboneSpec.to(BACKBONE, "DEFAULT")),
        memory=memory,
    )


def assert_equal_weights(first, second):
    for name, value in first.module_.state_dict().items():
        assert torch.equal(value, second.module_.state_dict()[name]), name
    assert first.history_ == second.history_


@pytest.mark.parametrize("most_kept", [2**30, 0])
@pytest.mark.parametrize("n_frozen", [1, 2, 3])
def test_rows_are_what_the_stages_give(images, monkeypatch, most_kept, n_frozen):
    monkeypatch.setattr(activations_room, "_MOST_KEPT", most_kept)
    network = replace_head(BACKBONE, 2).eval()
    got = build_frozen_activations(images, network=network).rows(n_frozen, [3, 39, 3])
    chosen = validate_images(images[[3, 39, 3]], estimator=network, reset=True)
    pixels = np.stack([BACKBONE.preprocessing(image) for image in chosen])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(each).view(3, 1, 1)
        for each in (BACKBONE.preprocessing.mean, BACKBONE.preprocessing.std)
    )
    with torch.no_grad():
        expected = network[:n_frozen]((x - mean) / std)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", ["head", 1, 2])
@pytest.mark.parametrize("options", [{}, {"early_stopping": True}, {"dropout": 0.5}])
def test_weights_have_equal_bits_however_rows_are_kept(
    paths, tmp_path, monkeypatch, trainable, options
):
    mine = classifier(trainable=trainable, **options)
    expected = clone(mine).fit(paths, Y)
    remembering = clone(mine).set_params(memory=tmp_path)
    assert_equal_weights(clone(remembering).fit(paths, Y), expected)  # a cold store
    monkeypatch.setattr(activations_room, "_MOST_KEPT", 0)
    assert_equal_weights(clone(mine).fit(paths, Y), expected)  # computed in each epoch
    assert_equal_weights(clone(remembering).fit(paths, Y), expected)  # read from it
    FeatureStore(tmp_path).clear()
    assert_equal_weights(clone(remembering).fit(paths, Y), expected)  # written and read


def test_training_from_a_boundary_is_training_of_the_whole(paths, monkeypatch):
    got = classifier(lr=1e-2, optimizer="sgd").fit(paths, Y)
    monkeypatch.setattr(
        "sktl._training.build.ActivationDataset", lambda pixels, _: pixels
    )
    expected = classifier(lr=1e-2, optimizer="sgd").fit(paths, Y)
    for name, value in expected.module_.state_dict().items():
        other = got.module_.state_dict()[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trainable", ["head", 1])
@pytest.mark.parametrize("most_kept", [2**30, 0])
def test_a_search_sends_each_image_once(
    paths, tmp_path, passes, monkeypatch, trainable, most_kept
):
    monkeypatch.setattr(activations_room, "_MOST_KEPT", most_kept)
    search = GridSearchCV(
        classifier(
            trainable=trainable, head_init="random", memory=tmp_path, max_epochs=1
        ),
        {"lr": [1e-3, 1e-4], "hidden_layer_sizes": [(), (4,)]},
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
    )
    search.fit(paths, Y)
    assert sum(passes) == 40
    search.fit(paths, Y)
    search.predict(paths)
    assert sum(passes) == 40


def test_the_linear_probe_needs_one_pass_more_unless_only_the_head_trains(
    paths, tmp_path, passes
):
    classifier(trainable="head", memory=tmp_path).fit(paths, Y)
    assert sum(passes) == 40
    classifier(trainable=1, memory=tmp_path).fit(paths, Y)  # the probe is known
    assert sum(passes) == 80
    layers = {s["space"]["layer"] for s in spaces(tmp_path)}
    assert layers == {"penultimate", "stage3"}


def spaces(directory):
    return FeatureStore(directory).info()["spaces"].values()


def test_rows_are_those_of_pretrained_features(paths, tmp_path, passes):
    mine = PretrainedFeatures(
        "resnet_mini", layer="stage2", pooling="flatten", batch_size=16, engine="torch"
    )
    flat = mine.set_params(memory=tmp_path).transform(paths)
    rows = build_frozen_activations(paths, tmp_path).rows(3, range(40))
    np.testing.assert_array_equal(rows.flatten(1), flat)
    assert sum(passes) == 40


def test_the_boundary_moves_down_as_stages_open(paths, tmp_path):
    mine = classifier(trainable="all", unfreeze_every=1, max_epochs=6)
    expected = clone(mine).fit(paths, Y)
    got = clone(mine).set_params(memory=tmp_path).fit(paths, Y)
    assert_equal_weights(got, expected)
    layers = {s["space"]["layer"] for s in spaces(tmp_path)}
    assert layers == {"stem", "stage1", "stage2", "stage3", "penultimate"}


def test_predictions_begin_at_the_boundary(paths, tmp_path, passes):
    plain = classifier().fit(paths, Y)
    mine = classifier(memory=tmp_path).fit(paths, Y)
    n_before = sum(passes)
    got = mine.predict_proba(paths[::-1])
    assert sum(passes) == n_before
    np.testing.assert_allclose(got, plain.predict_proba(paths[::-1]), rtol=1e-4)
    one = mine.predict_proba(paths[3:4])
    np.testing.assert_allclose(one[0], got[::-1][3], rtol=1e-4)


def test_a_limit_of_the_store_changes_nothing(paths, tmp_path):
    mine = classifier(weights=None, trainable="all", batch_size=8)
    expected = clone(mine).fit(paths, Y)
    store = FeatureStore(tmp_path, max_bytes=10**9)
    assert_equal_weights(mine.set_params(memory=store).fit(paths, Y), expected)


def test_what_somebody_does_to_the_network_is_not_remembered(paths, tmp_path):
    mine = classifier(trainable="head", memory=tmp_path).fit(paths[:20], Y[:20])
    with torch.no_grad():
        for parameter in mine.module_.parameters():
            parameter.mul_(2)
    activations_room.prepared.__globals__["_prepared"].clear()
    mine.module_.train()
    mine.predict(paths[20:])
    assert mine.module_[0].training
    features = PretrainedFeatures("resnet_mini", batch_size=16, engine="torch")
    expected = clone(features).transform(paths)
    got = features.set_params(memory=tmp_path).transform(paths)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_going_on_needs_nothing_that_is_known(paths, tmp_path, passes):
    mine = classifier(trainable=1, memory=tmp_path, warm_start=True).fit(paths, Y)
    n_before = sum(passes)
    mine.fit(paths, Y).partial_fit(paths, Y).predict(paths)
    assert sum(passes) == n_before


def test_of_a_network_that_has_trained_rows_are_others(paths, tmp_path, passes):
    mine = classifier(trainable=2, memory=tmp_path, warm_start=True).fit(paths, Y)
    n_before = sum(passes)
    mine.set_params(trainable=1).fit(paths, Y)  # stage3 is not the backbone's any more
    assert sum(passes) > n_before
    whole = mine.set_params(memory=None).predict_proba(paths)
    np.testing.assert_allclose(
        mine.set_params(memory=tmp_path).predict_proba(paths), whole, rtol=1e-3
    )


def test_more_than_a_store_may_have_is_not_stored(paths, tmp_path, capsys):
    store = FeatureStore(tmp_path, max_bytes=100_000)
    mine = classifier(head_init="random", memory=store, verbose=1)
    expected = classifier(head_init="random").fit(paths, Y)
    assert_equal_weights(mine.fit(paths, Y), expected)
    assert store.info()["rows"] == 0
    told = capsys.readouterr().err
    assert "activations of 40 images after stage3 of resnet_mini" in told
    assert "more than it may have: they are not remembered" in told


def test_the_bound_that_is_told_is_kept(paths, tmp_path, capsys):
    activations = build_frozen_activations(paths, tmp_path, verbose=1)
    activations.compute(3)
    told = float(capsys.readouterr().err.split(" MB")[0].split()[-1])
    most = activations.most_bytes(3)
    assert abs(told * 1e6 - most) < 1e5
    on_disk = FeatureStore(tmp_path).info()["bytes"]
    assert 0.9 * most < on_disk < 1.05 * most


def test_augmented_images_are_computed_each_time(paths, tmp_path, passes):
    mine = classifier(augmentation="flip", head_init="random", memory=tmp_path)
    mine.fit(paths, Y)
    assert not passes
    assert FeatureStore(tmp_path).info()["rows"] == 0


@pytest.mark.parametrize("options", [{}, {"early_stopping": True}])
@pytest.mark.parametrize("trainable", ["head", 1])
def test_views_have_equal_bits_however_they_are_kept(
    paths, tmp_path, monkeypatch, trainable, options
):
    mine = classifier(trainable=trainable, augmentation="standard", **options)
    mine.set_params(augmentation_views=3)
    expected = clone(mine).fit(paths, Y)
    remembering = clone(mine).set_params(memory=tmp_path)
    assert_equal_weights(clone(remembering).fit(paths, Y), expected)
    monkeypatch.setattr(activations_room, "_MOST_KEPT", 0)
    assert_equal_weights(clone(mine).fit(paths, Y), expected)
    assert_equal_weights(clone(remembering).fit(paths, Y), expected)


def test_training_on_what_is_said_of_views_is_training_on_views(paths, monkeypatch):
    mine = classifier(lr=1e-2, optimizer="sgd", augmentation="standard", max_epochs=4)
    got = mine.set_params(augmentation_views=3).fit(paths, Y)
    monkeypatch.setattr(
        "sktl._training.build.ActivationDataset", lambda pixels, _: pixels
    )
    expected = clone(mine).fit(paths, Y)
    for name, value in expected.module_.state_dict().items():
        other = got.module_.state_dict()[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)
    others = clone(mine).set_params(augmentation_views=2).fit(paths, Y)
    assert not torch.equal(others.module_[-1][-1].weight, got.module_[-1][-1].weight)


def test_a_search_sends_each_view_once(paths, tmp_path, passes):
    mine = classifier(augmentation="trivial", augmentation_views=2, max_epochs=2)
    mine.set_params(head_init="random", memory=tmp_path)
    search = GridSearchCV(mine, {"lr": [1e-3, 1e-4]}, cv=3).fit(paths, Y)
    # Two views of each to learn from, and each as it is to be scored.
    assert sum(passes) == 3 * 40
    search.fit(paths, Y)
    search.predict(paths)
    assert sum(passes) == 3 * 40


@pytest.mark.parametrize(
    "options", [{"random_state": None}, {"augmentation": ImageOps.mirror}]
)
def test_views_that_no_other_fit_can_have_are_not_remembered(paths, tmp_path, options):
    mine = classifier(augmentation="flip", augmentation_views=2, head_init="random")
    mine.set_params(memory=tmp_path, **options).fit(paths, Y)
    assert FeatureStore(tmp_path).info()["rows"] == 0


def test_a_bad_image_is_named_by_its_row(paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    X = [*paths[:20], str(tmp_path / "bad.png"), *paths[20:39]]
    with pytest.raises(ValueError, match=r"X\[20\].*bad\.png"):
        classifier(head_init="random").fit(X, Y)


def test_where_nothing_is_frozen_pixels_are_given(images):
    X = validate_images(images, estimator=PretrainedFeatures(), reset=True)
    pixels = ImageDataset(
        X,
        np.arange(40),
        Y,
        np.ones(40),
        augmentation=augmentation_for(None, BACKBONE.preprocessing),
        side=BACKBONE.preprocessing.crop_size,
        n_jobs=1,
    )
    mine = ActivationDataset(pixels, build_frozen_activations(images))
    assert len(mine) == 40
    (x, (label, weight)), _ = mine.batches(range(40), 2)
    assert x.dtype == torch.uint8
    mine.set_frozen_depth(3)
    (rows, (same, _)), _ = mine.batches(range(40), 2)
    assert rows.dtype == torch.float32
    assert len(x) == len(rows) == len(weight) == 20
    assert torch.equal(label, same)
