"""Defects of other libraries for transfer learning do not occur in sktl.

Tests of further defects are in the files of the modules that could have them:
`docs/reliability.md` lists all of them.
"""

import copy
import pickle

import joblib
import numpy as np
import pytest
import sklearn
import torch
from reference import normalized
from shared_fixtures import FIXED, TinyNet
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from torch import nn

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedFeatures,
    register_backbone,
)
from sktl._backbones.registry import load_backbone

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

SMALL = Preprocessing(resize_size=16, crop_size=16)


@pytest.fixture
def y():
    return np.repeat(["china", "flower"], 20)


def make_classifier(**options):
    """Return a fast classifier."""
    options = {"random_state": 0, "engine": "torch", **options}
    return FineTunedCNNClassifier("tiny", **{**FIXED, "max_epochs": 1, **options})


def check_equal(one, other):
    """Check that two state dicts are bit-identical."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# Networks in the wrong mode, and wrong networks


@pytest.mark.parametrize("memory", [False, True])
def test_network_is_used_in_evaluation_mode(images, tmp_path, memory):
    made = []

    def build():
        network = TinyNet()
        network.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5)
        )
        made.append(network.train())
        return network

    register_backbone("in training mode", build, preprocessing=SMALL)
    mine = PretrainedFeatures("in training mode", engine="torch")
    mine.set_params(memory=tmp_path if memory else None)
    before = copy.deepcopy(load_backbone("in training mode").network.state_dict())
    rows = mine.fit(images).transform(images)
    np.testing.assert_array_equal(mine.set_params(memory=None).transform(images), rows)
    for network in (load_backbone("in training mode").network, *made):
        check_equal(network.state_dict(), before)  # including BatchNorm statistics
    assert not any(
        m.training for m in load_backbone("in training mode").network.modules()
    )


def test_search_scores_different_networks(images):
    y = images.mean((1, 2, 3)) > np.median(images.mean((1, 2, 3)))
    networks = ["tiny", "always the same"]
    register_backbone(
        "always the same",
        lambda: nn.Sequential(
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(3, 2).requires_grad_(False)
        ),
        preprocessing=SMALL,
    )
    model = make_pipeline(PretrainedFeatures(engine="torch"), LogisticRegression())
    grid = {"pretrainedfeatures__backbone": networks}
    scoring = "neg_log_loss"
    found = GridSearchCV(model, grid, cv=2, scoring=scoring).fit(images, y)
    separate = [
        cross_val_score(
            make_pipeline(
                PretrainedFeatures(name, engine="torch"), LogisticRegression()
            ),
            images,
            y,
            cv=2,
            scoring=scoring,
        ).mean()
        for name in networks
    ]
    assert separate[0] != separate[1]
    np.testing.assert_allclose(found.cv_results_["mean_test_score"], separate)


def test_cache_key_depends_on_the_network(images, tmp_path):
    seeds = iter([1, 2])

    def build():
        torch.manual_seed(next(seeds))
        return TinyNet()

    rows = []
    for _ in range(2):  # two networks of the same name
        register_backbone("changing", build, preprocessing=SMALL)
        mine = PretrainedFeatures("changing", engine="torch", memory=tmp_path)
        rows.append(mine.transform(images))
        plain = clone(mine).set_params(memory=None).transform(images)
        np.testing.assert_array_equal(rows[-1], plain)
    assert not np.allclose(*rows)


def test_cache_is_kept_by_clone_and_pickle(images, tmp_path, monkeypatch):
    mine = PretrainedFeatures("tiny", memory=tmp_path).fit(images)
    expected = mine.transform(images)
    monkeypatch.setattr(
        "sktl._inference.cached_forward.batches", None
    )  # computing any row raises
    for copied in (
        clone(mine),
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        make_pipeline(clone(mine)),
    ):
        np.testing.assert_array_equal(copied.transform(images), expected)


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_b0",
        pytest.param("densenet121", marks=pytest.mark.slow),
        "squeezenet1_1",
    ],
)
def test_pooling_of_one_image_equals_that_of_many(images, name):
    mine = PretrainedFeatures(
        name, weights=None, image_size=64, batch_size=2, engine="torch"
    )
    many = mine.transform(images[:3])
    alone = np.vstack([mine.transform(images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(alone, many, rtol=0, atol=1e-5 * np.abs(many).max())


def test_features_of_densenet_follow_the_last_relu(images):
    mine = PretrainedFeatures(
        "densenet121", weights=None, image_size=64, engine="torch"
    )
    rows = mine.transform(images[:2])
    assert rows.min() >= 0  # its input is negative
    backbone = load_backbone("densenet121", None)
    with torch.inference_mode():
        x = normalized(images[:2], backbone.preprocessing_at(64))
        maps = backbone.network.features(x)
    assert maps.min() < 0
    expected = maps.relu().mean((2, 3)).numpy()
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5 * expected.max())


# Training that changes shared state, and training that is lost


def test_fit_does_not_change_shared_networks(images, y):
    features = PretrainedFeatures("tiny", engine="torch")
    before = features.transform(images)
    first = make_classifier(lr=0.1, wise_ft_alpha=1.0).fit(images, y)
    np.testing.assert_array_equal(features.transform(images), before)
    # A clone starts from the pretrained weights, not from the trained ones.
    again = clone(first).fit(images, y)
    check_equal(again.module_.state_dict(), first.module_.state_dict())
    assert again.loss_curve_ == first.loss_curve_


def test_clone_keeps_the_pretrained_weights(images, y, tmp_path):
    torch.manual_seed(5)
    network = TinyNet()
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    model = make_classifier(
        weights=tmp_path / "mine.pth", max_epochs=0, head_init="random"
    )
    found = cross_validate(clone(model), images, y, cv=2, return_estimator=True)
    for fitted in (*found["estimator"], clone(model.fit(images, y)).fit(images, y)):
        stem, stage1, *_ = fitted.module_
        check_equal(stem.state_dict(), network.stages["stem"].state_dict())
        check_equal(stage1.state_dict(), network.stages["stage1"].state_dict())


def test_cross_validation_keeps_the_number_of_epochs(images, y):
    found = cross_validate(
        make_classifier(max_epochs=3), images, y, cv=2, return_estimator=True
    )
    assert [fitted.n_iter_ for fitted in found["estimator"]] == [3, 3]


def test_metadata_request_of_fit():
    mine = make_classifier()
    with sklearn.config_context(enable_metadata_routing=True):
        mine.set_fit_request(sample_weight=True)
        requests = mine.get_metadata_routing()
    validation = dict.fromkeys(["X_val", "y_val", "sample_weight_val"])
    # As the splitters of scikit-learn, so that no estimator divides a group.
    expected = {"sample_weight": True, "groups": True, **validation}
    assert requests.fit.requests == expected
    assert requests.score.requests == {"sample_weight": None}


def test_fit_does_not_change_parameters(images, y):
    weights, sizes = {"china": 2.0, "flower": 1.0}, [4]
    mine = make_classifier(class_weight=weights, hidden_layer_sizes=sizes)
    mine.fit(images, y)
    assert (weights, sizes) == ({"china": 2.0, "flower": 1.0}, [4])
    assert mine.class_weight is weights
    assert mine.hidden_layer_sizes is sizes


def test_fitted_search_can_be_copied(images, y, tmp_path):
    search = GridSearchCV(make_classifier(), {"lr": [1e-3]}, cv=2).fit(images, y)
    expected = search.predict_proba(images)
    joblib.dump(search, tmp_path / "search.joblib", compress=3)
    for copied in (
        copy.deepcopy(search),
        pickle.loads(pickle.dumps(search)),
        joblib.load(tmp_path / "search.joblib"),
    ):
        np.testing.assert_array_equal(copied.predict_proba(images), expected)
        again = clone(copied)
    again.fit(images, y)


# Missing rows


@pytest.mark.parametrize("memory", [False, True])
def test_rows_of_unreadable_images_are_not_dropped(paths, tmp_path, memory):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    mine = PretrainedFeatures("tiny", memory=tmp_path / "store" if memory else None)
    for index in (0, 5, 39, 40):
        X = [*paths[:index], str(bad), *paths[index:]]
        with pytest.raises(ValueError, match=rf"X\[{index}\] \(.*bad\.png"):
            mine.transform(X)
    X = [*paths, paths[3], paths[3]]
    rows = mine.transform(X)
    assert len(rows) == len(X)
    np.testing.assert_array_equal(rows[40:], rows[[3, 3]])
