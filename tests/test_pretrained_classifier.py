"""PretrainedClassifier, compared with the plain network and plain arithmetic."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import normalized
from sklearn.datasets import load_files
from sklearn.metrics import log_loss, roc_auc_score, top_k_accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from torch import nn
from torchvision import models

from sktl import Preprocessing, PretrainedClassifier, register_backbone
from sktl._backbones.registry import load_backbone
from sktl._backbones.resnet_mini import ResNetMini

CATEGORIES = ("zebra", "ant", "crane", "bee", "crane")


@pytest.fixture(scope="module", autouse=True)
def named():
    """Register a network whose categories are not sorted."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    head = nn.Linear(8, 5)
    nn.init.normal_(head.weight, std=20)
    register_backbone(
        "named",
        lambda: nn.Sequential(*net, head),
        preprocessing=Preprocessing(16, 16),
        categories=CATEGORIES,
    )


@pytest.fixture
def raw(images):
    """Probabilities of the plain network, in its own order."""
    backbone = load_backbone("named")
    with torch.inference_mode():
        logits = backbone.network(normalized(images, backbone.preprocessing))
        return logits.softmax(1).numpy()


@pytest.fixture
def y(raw, images):
    """Labels that mostly agree with the plain network."""
    guess = raw.argmax(1)
    guess[:10] = np.arange(10) % 5
    return np.array(["zebra", "ant", "crane (2)", "bee", "crane (4)"])[guess]


def test_classes_are_sorted_and_columns_permuted(images, raw):
    mine = PretrainedClassifier("named").fit(images)
    assert list(mine.classes_) == ["ant", "bee", "crane (2)", "crane (4)", "zebra"]
    proba = mine.predict_proba(images)
    np.testing.assert_allclose(proba, raw[:, [1, 3, 2, 4, 0]], atol=1e-5)
    own = np.array(["zebra", "ant", "crane (2)", "bee", "crane (4)"])
    np.testing.assert_array_equal(mine.predict(images), own[raw.argmax(1)])


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_resize(images, resize):
    images = images[:, :12]
    backbone = load_backbone("named")
    x = normalized(images, backbone.preprocessing_at(None, resize))
    with torch.inference_mode():
        expected = backbone.network(x).softmax(1).numpy()
    mine = PretrainedClassifier("named", resize=resize).fit(images)
    proba = mine.predict_proba(images)
    np.testing.assert_allclose(proba, expected[:, [1, 3, 2, 4, 0]], atol=1e-5)


def test_scorers_agree_with_the_network_in_its_own_order(images, raw, y):
    mine = PretrainedClassifier("named").fit(images)
    own = np.array(["zebra", "ant", "crane (2)", "bee", "crane (4)"])
    truth = np.argmax(own == y[:, None], axis=1)
    proba = mine.predict_proba(images)
    raw = raw.astype(np.float64) / raw.sum(1, keepdims=True, dtype=np.float64)
    for ours, theirs in (
        (
            roc_auc_score(y, proba, multi_class="ovr"),
            roc_auc_score(truth, raw, multi_class="ovr"),
        ),
        (log_loss(y, proba), log_loss(truth, raw)),
        (top_k_accuracy_score(y, proba), top_k_accuracy_score(truth, raw)),
        (mine.score(images, y), (raw.argmax(1) == truth).mean()),
    ):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_label_map_sums_probabilities(images, raw):
    label_map = {"ant": "insect", "bee": "insect", "zebra": "other"}
    mine = PretrainedClassifier("named", label_map=label_map).fit(images)
    assert list(mine.classes_) == ["insect", "other"]
    insect, other = raw[:, 1] + raw[:, 3], raw[:, 0]
    expected = np.stack([insect, other], axis=1) / (insect + other)[:, None]
    np.testing.assert_allclose(mine.predict_proba(images), expected, atol=1e-5)


@pytest.mark.parametrize("labels", [(False, True), (10, 20), ("no", "yes")])
def test_labels_of_any_type(images, raw, labels):
    label_map = {"ant": labels[1], "bee": labels[1], "zebra": labels[0]}
    mine = PretrainedClassifier("named", label_map=label_map).fit(images)
    got = mine.predict(images)
    assert got.dtype == np.asarray(labels).dtype
    y = np.where(raw[:, 1] + raw[:, 3] > raw[:, 0], labels[1], labels[0])
    np.testing.assert_array_equal(got, y)
    learned = PretrainedClassifier("named").fit(images, y)
    assert learned.predict(images).dtype == y.dtype
    assert learned.score(images, y) > 0.9


@pytest.mark.parametrize("label_map", [None, {"ant": "a", "bee": "b"}])
def test_missing_label_raises(images, label_map):
    y = ["a", "b", float("nan"), "a"]
    with pytest.raises(ValueError, match=r"y\[2\] is missing \(nan\)\. Each image"):
        PretrainedClassifier("named", label_map=label_map).fit(images[:4], y)


def test_learned_classes_are_smoothed_counts(images, raw):
    y = np.repeat(["china", "flower"], 20)
    weight = np.linspace(0, 2, 40)
    mine = PretrainedClassifier("named").fit(images, y, weight)
    counts = np.ones((5, 2))
    for row, label, w in zip(raw, y, weight, strict=True):
        counts[:, int(label == "flower")] += w * row
    p_label = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(mine.class_proba_given_category_, p_label, rtol=1e-5)
    np.testing.assert_allclose(mine.predict_proba(images), raw @ p_label, atol=1e-5)


def test_decision_function_is_the_logarithm(images):
    mine = PretrainedClassifier("named").fit(images)
    proba = mine.predict_proba(images)
    scores = mine.decision_function(images)
    np.testing.assert_allclose(np.exp(scores), proba, atol=1e-12)
    two = PretrainedClassifier("named", label_map={"ant": 0, "bee": 1}).fit(images)
    odds = two.predict_proba(images)[:, 1] / two.predict_proba(images)[:, 0]
    np.testing.assert_allclose(two.decision_function(images), np.log(odds))


def test_top_k(images):
    mine = PretrainedClassifier("named").fit(images)
    labels, probabilities = mine.top_k(images, k=3)
    assert labels.shape == probabilities.shape == (40, 3)
    np.testing.assert_array_equal(labels[:, 0], mine.predict(images))
    proba = np.sort(mine.predict_proba(images), axis=1)
    np.testing.assert_array_equal(probabilities, proba[:, :-4:-1])
    for k in (0, 6, 1.5):
        with pytest.raises(ValueError, match=r"'k' parameter of top_k .* Got"):
            mine.top_k(images, k=k)


def test_in_cross_validation_and_grid_search(paths, y):
    mine = PretrainedClassifier("named")
    assert cross_val_score(mine, paths, y == "ant", cv=3).shape == (3,)
    maps = [{"ant": True, "bee": False}, {"ant": True, "zebra": False}]
    search = GridSearchCV(mine, {"label_map": maps}, cv=2, error_score="raise")
    assert search.fit(paths, y == "ant").best_params_["label_map"] in maps


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (
            {"ants": 0},
            r"Got 'ants', .* not one of the 5 .* closest ones: ant",
        ),
        ({"crane": 0}, r"closest ones: crane \(4\), crane \(2\)"),
        ({}, "must contain at least one category"),
        ({"ant": "x", "bee": "y"}, r"every label in y\. Got no category for \['zebra'"),
    ],
)
def test_label_maps_are_checked(images, label_map, message):
    y = np.repeat(["x", "zebra"], 20)
    with pytest.raises(ValueError, match=message):
        PretrainedClassifier("named", label_map=label_map).fit(images, y)


def test_weights_without_categories_raise_an_error(images, tmp_path):
    file = tmp_path / "ten.pth"
    torch.save(models.squeezenet1_1(num_classes=10).state_dict(), file)
    for backbone, weights in (("squeezenet1_1", file), ("resnet_mini", None)):
        mine = PretrainedClassifier(backbone, weights=weights)
        with pytest.raises(ValueError, match=f"weights='.*{weights}' of '{backbone}'"):
            mine.fit(images)


def test_another_backbone_since_fit_raises_an_error(images):
    mine = PretrainedClassifier("named").fit(images)
    mine.set_params(backbone="resnet_mini")
    with pytest.raises(ValueError, match=r"those seen in fit.* Call fit again"):
        mine.predict(images)


@pytest.mark.slow
def test_real_predictions_equal_those_of_torchvision(test_data):
    weights = test_data / "weights" / "squeezenet1_1-imagenet.pth"
    paths = load_files(test_data / "hymenoptera" / "val", load_content=False).filenames
    paths = sorted(paths)[::9]
    net = models.squeezenet1_1()
    net.load_state_dict(torch.load(weights, weights_only=True))
    enum = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    transform, names = enum.transforms(), np.array(enum.meta["categories"])
    with torch.inference_mode():
        x = torch.stack([transform(Image.open(p).convert("RGB")) for p in paths])
        expected = net.eval()(x).softmax(1).numpy()
    mine = PretrainedClassifier("squeezenet1_1", weights=weights).fit(paths)
    np.testing.assert_array_equal(mine.predict(paths), names[expected.argmax(1)])
    proba = mine.predict_proba(paths)
    np.testing.assert_allclose(proba, expected[:, np.argsort(names)], atol=1e-5)


def test_a_failed_fit_keeps_the_fitted_state(images, y, tmp_path):
    mine = PretrainedClassifier("named").fit(images, y)
    expected = mine.predict(images)
    bad = [*images[:39], tmp_path / "gone.png"]
    with pytest.raises(ValueError, match=r"X\[39\]"):
        mine.fit(bad, np.arange(40) % 5)
    np.testing.assert_array_equal(mine.predict(images), expected)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, r"named categories.*head is missing"),
        ([0, 1] * 20, r"trained classification head.*is missing.* PretrainedFeatures"),
    ],
)
def test_weights_without_a_head_raise(tmp_path, images, y, message):
    state = load_backbone("resnet_mini").network.state_dict()
    body = {name: v for name, v in state.items() if not name.startswith("head.")}
    torch.save(body, tmp_path / "body.pth")
    classifier = PretrainedClassifier("resnet_mini", weights=tmp_path / "body.pth")
    with pytest.raises(ValueError, match=message):
        classifier.fit(images, y)


def test_classes_are_learned_without_names_of_categories(images, raw, y):
    network = copy.deepcopy(load_backbone("named").network)
    register_backbone("unnamed", lambda: network, preprocessing=Preprocessing(16, 16))
    mine = PretrainedClassifier("unnamed").fit(images, y)
    named = PretrainedClassifier("named").fit(images, y)
    np.testing.assert_array_equal(
        mine.predict_proba(images), named.predict_proba(images)
    )
    for options in ({}, {"label_map": {"ant": 1}}):
        with pytest.raises(ValueError, match=r"'DEFAULT' of 'unnamed'.* Pass y to fit"):
            PretrainedClassifier("unnamed", **options).fit(images)


def test_classes_are_learned_from_a_file_with_other_outputs(images, tmp_path):
    network = ResNetMini(7)
    torch.save(network.state_dict(), tmp_path / "seven.pth")
    y = np.arange(40) % 2
    mine = PretrainedClassifier("resnet_mini", weights=tmp_path / "seven.pth")
    mine.set_params(image_size=32, engine="torch").fit(images, y)
    assert mine.class_proba_given_category_.shape == (7, 2)
    assert set(mine.predict(images)) <= {0, 1}


@pytest.mark.parametrize("weights", ["DEFAULT", None])
def test_outputs_that_are_not_of_a_trained_head_raise(images, weights):
    def headless():
        network = models.resnet18()
        network.fc = nn.Identity()
        return network

    register_backbone("headless", headless, preprocessing=Preprocessing(32, 32))
    backbone = "headless" if weights else "resnet_mini"
    reason = "its outputs are features" if weights else "weights are random"
    mine = PretrainedClassifier(backbone, weights=weights)
    with pytest.raises(ValueError, match=f"{backbone}', .*{reason}"):
        mine.fit(images, np.arange(40) % 2)


def test_embeddings_are_no_categories(images, monkeypatch):
    network = copy.deepcopy(load_backbone("named").network)
    register_backbone("tower", lambda: network, preprocessing=Preprocessing(16, 16))
    definition = load_backbone("tower").definition
    monkeypatch.setattr(
        load_backbone("tower"), "definition", replace(definition, embedding_width=5)
    )
    with pytest.raises(ValueError, match="of 'tower', whose outputs are embeddings"):
        PretrainedClassifier("tower").fit(images, np.arange(40) % 2)
