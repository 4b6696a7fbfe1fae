"""Tests of FineTunedCNNRegressor: training, prediction, saving, scikit-learn tools."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from interrupted_training import StopAt
from reference import normalized
from shared_fixtures import FIXED
from sklearn.base import clone, is_regressor
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback, EpochScoring

from sktl import FineTunedCNNClassifier, FineTunedCNNRegressor, PretrainedFeatures
from sktl._training.ridge_probe import ALPHA_GRID

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


def make_regressor(**parameters):
    defaults = {**FIXED, "max_epochs": 2, "random_state": 0, "batch_size": 8}
    defaults |= {"engine": "torch"}  # OpenVINO would convert the network of each fit
    return FineTunedCNNRegressor(**{"backbone": "tiny", **defaults, **parameters})


@pytest.fixture
def y(images):
    """Return the mean brightness of each image, in no usual unit."""
    return 1000 + 3 * images.mean(axis=(1, 2, 3))


@pytest.fixture
def Y(images):
    """Return the mean of each channel."""
    return images.mean(axis=(1, 2))


GREY = np.arange(16, dtype=np.uint8)  # levels
FLAT = np.full((16, 16, 16, 3), 10, np.uint8) * GREY[:, None, None, None]


def equal_bits(one, other):
    weights = other.module_.state_dict()
    return all(torch.equal(v, weights[k]) for k, v in one.module_.state_dict().items())


def test_epoch_0_is_the_ridge_regression_on_frozen_features(images, Y):
    regressor = make_regressor(max_epochs=0).fit(images, Y)
    standardized = (Y - Y.mean(axis=0)) / Y.std(axis=0)
    features = make_pipeline(PretrainedFeatures("tiny"), StandardScaler())
    x = features.fit_transform(images).astype(float)
    predicted = [
        Ridge(alpha=alpha).fit(x, standardized).predict(x) for alpha in ALPHA_GRID
    ]
    got = regressor.predict(images)
    scaled = (got - Y.mean(axis=0)) / Y.std(axis=0)
    assert min(np.abs(each - scaled).max() for each in predicted) < 1e-4
    assert regressor.n_iter_ == regressor.best_epoch_ == 0
    (row,) = regressor.history_
    assert row["train_loss"] == pytest.approx(1 - r2_score(Y, got), abs=1e-5)


@pytest.mark.parametrize("loss", ["squared_error", "absolute_error", "huber"])
def test_training_reduces_the_loss(images, y, loss):
    regressor = make_regressor(loss=loss, max_epochs=6, lr=3e-4, wise_ft_alpha=1.0)
    regressor.fit(images, y)
    losses = [row["train_loss"] for row in regressor.history_]
    assert losses[-1] < losses[0]
    assert regressor.score(images, y) > 0.9


def test_predictions_equal_the_module_in_plain_pytorch(images, Y):
    regressor = make_regressor().fit(images, Y)
    with torch.inference_mode():
        outputs = regressor.module_(normalized(images, regressor.preprocessing_))
    expected = outputs.numpy() * regressor.target_scale_ + regressor.target_center_
    np.testing.assert_allclose(regressor.predict(images), expected, atol=1e-3)


FORMS = {
    "list": lambda y: y.tolist(),
    "float32": lambda y: y.astype("f4"),
    "int": lambda y: y.astype(int),
    "Series": lambda y: pd.Series(y, index=range(7, 7 + len(y))),
    "object": lambda y: y.astype(object),
    "column": lambda y: y[:, None],
    "frame": lambda y: pd.DataFrame({"level": y}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_y_gives_equal_bits(form):
    expected = make_regressor(max_epochs=1).fit(FLAT, GREY.astype(float)).predict(FLAT)
    regressor = make_regressor(max_epochs=1).fit(FLAT, FORMS[form](GREY.astype(float)))
    got = regressor.predict(FLAT)
    assert got.shape == ((16, 1) if form in ("column", "frame") else (16,))
    np.testing.assert_array_equal(got.ravel(), expected)
    assert regressor.predict(FLAT[:1]).shape == got[:1].shape


def test_grey_levels():
    # The loss of (n, 1) outputs and (n,) targets would be twice the variance.
    regressor = make_regressor(max_epochs=5).fit(FLAT, GREY)
    assert regressor.history_[0]["train_loss"] < 0.01
    assert regressor.score(FLAT, GREY) > 0.9
    assert regressor.predict(FLAT[:1]).shape == (1,)


def test_constant_targets(images):
    regressor = make_regressor(lr="auto", head_init="auto", wise_ft_alpha="auto")
    predicted = regressor.fit(images, np.full(40, 0.1)).predict(images)
    np.testing.assert_array_equal(predicted, np.full(40, 0.1))


@pytest.mark.parametrize(
    ("value", "column"), [(np.nan, None), (np.inf, None), (np.nan, 1), (None, 0)]
)
def test_missing_targets_are_named_before_anything_is_computed(
    images, Y, value, column, monkeypatch
):
    monkeypatch.setattr("sktl._training.base_estimator.fit_model", None)
    bad = Y.astype(object) if column is not None else Y[:, 0].copy()
    bad[(3,) if column is None else (3, column)] = value
    where = r"y\[3\]" if column is None else rf"y\[3, {column}\]"
    with pytest.raises(ValueError, match=where):
        make_regressor().fit(images, bad)


def test_labels_name_the_classifier_and_numbers_the_regressor(images, y):
    with pytest.raises(ValueError, match="use FineTunedCNNClassifier"):
        make_regressor().fit(images, np.repeat(["a", "b"], 20))
    with pytest.raises(ValueError, match="use FineTunedCNNRegressor"):
        FineTunedCNNClassifier("tiny").fit(images, y)
    with pytest.raises(ValueError, match="use FineTunedCNNRegressor"):
        FineTunedCNNClassifier("tiny").fit(images, np.stack([y, y], axis=1))


@pytest.mark.parametrize("loss", ["absolute_error", "huber"])
def test_an_outlier_does_not_spoil_robust_losses(images, y, loss):
    regressor = make_regressor(loss=loss, max_epochs=4)
    clean = clone(regressor).fit(images, y)
    y[3] = 1e6
    regressor.fit(images, y)
    others = np.arange(40) != 3
    score = r2_score(y[others], regressor.predict(images[others]))
    assert score > clean.score(images[others], y[others]) - 0.1


def test_an_outlier_is_finite_with_the_squared_error(images, y):
    y[3] = 1e6
    assert np.isfinite(make_regressor(lr="auto").fit(images, y).predict(images)).all()


def test_weights_of_zero_and_their_scale_do_not_matter(images, y):
    weight = np.r_[np.zeros(10), np.full(30, 7.0)]
    y[0] = 1e6
    weighted = make_regressor().fit(images, y, sample_weight=weight)
    without = make_regressor().fit(images[10:], y[10:])
    assert equal_bits(weighted, without)


def test_early_stopping_keeps_the_epoch_of_the_best_r2(images, y):
    regressor = make_regressor(
        early_stopping=True, validation_fraction=0.25, max_epochs=4, lr=0.05
    ).fit(images, y)
    scores = [row["valid_score"] for row in regressor.history_]
    assert regressor.best_epoch_ == int(np.argmax(np.round(scores, 6)))
    assert regressor.validation_scores_ == scores[1:]


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_selection_compares_the_loss_of_held_out_images(images, Y, loss):
    auto = {"lr": "auto", "head_init": "auto", "wise_ft_alpha": "auto"}
    regressor = make_regressor(loss=loss, **auto).fit(images, Y)
    rows = regressor.selection_
    losses = [row["valid_loss"] for row in rows]
    best = rows[int(np.argmin(losses))]
    assert rows[-1]["n_epochs"] == 0
    # The probe is kept unless another row is clearly better, which is then the best.
    assert regressor.wise_ft_alpha_ in (0, best["wise_ft_alpha"])
    if loss == "squared_error":  # both are computed from the same squared errors
        scores = np.array([row["valid_score"] for row in rows])
        assert np.corrcoef(losses, scores)[0, 1] < -0.9


def test_two_images_have_settings_without_selection():
    regressor = make_regressor(lr="auto")
    with pytest.warns(UserWarning, match="at least four images"):
        regressor.fit(FLAT[[0, 9]], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least two images"):
        make_regressor().fit(FLAT[:1], [1.0])


def test_partial_fit_keeps_the_units_of_the_first_call(images, y):
    regressor = make_regressor()
    for rows in (slice(0, 40, 2), slice(1, 40, 2), slice(3)):
        assert regressor.partial_fit(images[rows], y[rows]) is regressor
        assert regressor.target_center_ == pytest.approx(y[::2].mean())
    assert regressor.n_iter_ == 3
    with pytest.raises(ValueError, match="which had 1 per image"):
        regressor.partial_fit(images, np.stack([y, y], axis=1))
    with pytest.raises(ValueError, match="early_stopping must be False"):
        make_regressor(early_stopping=True).partial_fit(images, y)


def test_warm_start_continues(images, y):
    regressor = make_regressor(warm_start=True).fit(images, y)
    center = regressor.target_center_.copy()
    regressor.fit(images[:20], y[:20])
    np.testing.assert_array_equal(regressor.target_center_, center)
    np.testing.assert_allclose(regressor.predict(images), y, rtol=0.5)


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_save_load_and_pickle(images, Y, tmp_path, columns):
    y = Y[:, 0] if columns is None else Y[:, :columns]
    regressor = make_regressor(loss="huber", lr="auto").fit(images, y)
    regressor.save(tmp_path / "model.safetensors")
    loaded = FineTunedCNNRegressor.load(tmp_path / "model.safetensors")
    assert loaded.loss == "huber"
    assert loaded.selection_ == regressor.selection_
    for copied in (loaded, pickle.loads(pickle.dumps(regressor))):
        np.testing.assert_array_equal(copied.predict(images), regressor.predict(images))
        np.testing.assert_array_equal(copied.target_scale_, regressor.target_scale_)
    with pytest.raises(ValueError, match=r"must be a file of FineTunedCNNClassifier"):
        FineTunedCNNClassifier.load(tmp_path / "model.safetensors")


def test_a_saved_regressor_is_a_backbone_without_categories(images, y, tmp_path):
    file = tmp_path / "model.safetensors"
    regressor = make_regressor().fit(images, y)
    regressor.save(file)
    start = {"weights": file, "engine": "torch"}
    features = PretrainedFeatures("tiny", **start).transform(images)
    assert features.shape == (40, 16)
    classifier = FineTunedCNNClassifier("tiny", max_epochs=0, **start)
    assert classifier.fit(images, np.arange(40) % 2).predict(images).shape == (40,)
    again = make_regressor(weights=file, max_epochs=0).fit(images, y)
    assert again.score(images, y) > 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"lr": "auto"}, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_has_equal_bits(images, Y, tmp_path, options):
    options = {"max_epochs": 4, "dropout": 0.3, "augmentation": "flip", **options}
    expected = make_regressor(**options).fit(images, Y)
    regressor = make_regressor(checkpoint=tmp_path, **options)
    with pytest.raises(KeyboardInterrupt):
        clone(regressor).set_params(callbacks=[StopAt(3)]).fit(images, Y)
    regressor.fit(images, Y)
    assert regressor.history_ == expected.history_
    assert equal_bits(regressor, expected)
    with pytest.raises(ValueError, match=r"differs in .*scale"):
        regressor.fit(images, 2 * Y)


def test_callbacks_get_numbers_and_predict_them(images, y):
    seen = []

    class Record(Callback):
        def on_batch_end(self, net, batch=None, training=False, **kwargs):
            seen.extend(batch[1].tolist())

    scoring = EpochScoring("r2", on_train=True, lower_is_better=False)
    regressor = make_regressor(callbacks=[Record(), scoring], max_epochs=1)
    regressor.fit(images, y)
    np.testing.assert_allclose(sorted(seen), np.sort(y), rtol=1e-5)
    assert regressor.net_.history[-1, "r2"] < 1


class TestScikitLearn:
    def test_is_a_regressor(self):
        assert is_regressor(FineTunedCNNRegressor())

    def test_transformed_target(self, images, y):
        model = TransformedTargetRegressor(
            make_regressor(max_epochs=1), func=np.log, inverse_func=np.exp
        ).fit(images, y)
        expected = make_regressor(max_epochs=1).fit(images, np.log(y)).predict(images)
        np.testing.assert_allclose(model.predict(images), np.exp(expected))

    def test_grid_search_and_cross_validation(self, paths, y):
        grid = {"loss": ["squared_error", "huber"]}
        search = GridSearchCV(make_regressor(max_epochs=0), grid, cv=2).fit(paths, y)
        assert set(search.best_params_) == {"loss"}
        scoring = "neg_mean_absolute_error"
        regressor = make_regressor(max_epochs=0)
        scores = cross_val_score(regressor, paths, y, scoring=scoring, cv=2)
        assert (scores < 0).all()
