"""Tests of FineTunedCNNClassifier: training, prediction, saving, scikit-learn tools."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from interrupted_training import StopAt
from reference import normalized
from scipy import sparse
from shared_fixtures import FIXED, TinyNet
from sklearn.base import clone
from sklearn.datasets import load_files
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  (required)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import (
    HalvingGridSearchCV,
    KFold,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback, EpochScoring
from torch.nn import functional as F

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedClassifier,
    PretrainedFeatures,
    register_backbone,
)
from sktl._training.linear_probe import C_GRID

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


@pytest.fixture
def y():
    return np.repeat(["china", "flower"], 20)


def make_classifier(**parameters):
    defaults = {**FIXED, "max_epochs": 2, "random_state": 0, "batch_size": 8}
    defaults |= {"engine": "torch"}
    return FineTunedCNNClassifier(**{"backbone": "tiny", **defaults, **parameters})


def test_epoch_0_is_the_logistic_regression_on_frozen_features(images, y):
    classifier = make_classifier(max_epochs=0).fit(images, y)
    candidates = [
        make_pipeline(
            PretrainedFeatures("tiny"), StandardScaler(), LogisticRegression(C=C)
        ).fit(images, y)
        for C in C_GRID
    ]
    proba = classifier.predict_proba(images)
    errors = [np.abs(c.predict_proba(images) - proba).max() for c in candidates]
    probe = candidates[int(np.argmin(errors))]
    assert min(errors) < 1e-4
    assert classifier.score(images, y) == probe.score(images, y)
    assert classifier.n_iter_ == classifier.best_epoch_ == 0
    assert classifier.loss_curve_ == []
    assert [row["epoch"] for row in classifier.history_] == [0]


@pytest.mark.parametrize(
    ("resize", "engine"),
    [(None, "auto"), ("crop", "torch"), ("squash", "torch"), ("pad", "auto")],
)
def test_predictions_equal_the_module_in_plain_pytorch(images, y, resize, engine):
    images = images[:, :, :12]  # 24 x 12 pixels
    classifier = make_classifier(resize=resize, engine=engine).fit(images, y)
    assert classifier.preprocessing_.resize == (resize or "crop")
    assert not classifier.module_.training
    with torch.inference_mode():
        logits = classifier.module_(normalized(images, classifier.preprocessing_))
    proba = F.softmax(logits, dim=1).numpy()
    np.testing.assert_allclose(classifier.predict_proba(images), proba, atol=1e-5)
    scores = (logits[:, 1] - logits[:, 0]).numpy()
    np.testing.assert_allclose(classifier.decision_function(images), scores, atol=1e-4)


@pytest.mark.parametrize("trainable", ["head", 1, "stage1", "all"])
def test_training_reduces_the_loss(images, y, trainable):
    classifier = make_classifier(
        trainable=trainable, head_init="random", max_epochs=15, lr=2e-2
    ).fit(images, y)
    assert len(classifier.loss_curve_) == classifier.n_iter_ == 15
    assert classifier.loss_curve_[-1] < 0.8 * classifier.loss_curve_[0]
    assert classifier.score(images, y) > 0.7  # of two classes of equal size


@pytest.mark.parametrize(
    "labels", [[3, 7], ["b", "a"], [False, True], [2.0, 1.0], [-1, 1]]
)
def test_labels_of_any_type_are_predicted(images, labels):
    y = np.repeat(labels, 20)
    classifier = make_classifier(max_epochs=0).fit(images, y)
    np.testing.assert_array_equal(classifier.classes_, np.unique(y))
    assert classifier.predict(images).dtype == y.dtype
    assert accuracy_score(y, classifier.predict(images)) > 0.8


def test_class_weight_equals_sample_weight(images, y):
    weights = {"china": 3.0, "flower": 1.0}
    sample_weight = np.array([weights[label] for label in y])
    by_class = make_classifier(class_weight=weights).fit(images, y)
    by_sample = make_classifier().fit(images, y, sample_weight=sample_weight)
    proba = by_sample.predict_proba(images)
    np.testing.assert_array_equal(by_class.predict_proba(images), proba)
    assert by_class.score(images, y, sample_weight=sample_weight) == accuracy_score(
        y, by_sample.predict(images), sample_weight=sample_weight
    )


def test_sample_weight_is_routed_in_cross_validation(images, y):
    weight = np.where(np.arange(40) % 20 < 15, 1.0, 0.0)
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = make_classifier(max_epochs=0)
        classifier.set_fit_request(sample_weight=True)
        classifier.set_score_request(sample_weight=True)
        results = cross_validate(
            classifier, images, y, cv=2, params={"sample_weight": weight}
        )
    assert results["test_score"].shape == (2,)


def test_image_of_weight_0_has_no_effect(images, y):
    weight = np.ones(40)
    weight[[3, 30]] = 0
    classifier = make_classifier().fit(images, y, sample_weight=weight)
    expected = make_classifier().fit(
        np.delete(images, [3, 30], 0), np.delete(y, [3, 30])
    )
    np.testing.assert_array_equal(
        classifier.predict_proba(images), expected.predict_proba(images)
    )
    with pytest.raises(ValueError, match="at least one non-zero"):
        make_classifier().fit(images, y, sample_weight=np.zeros(40))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_weights_are_interpolated_with_the_linear_probe(images, y, alpha):
    settings = {**FIXED, "lr": 1e-3, "trainable": 2, "random_state": 0}
    settings |= {"engine": "torch", "max_epochs": 3}
    model = FineTunedCNNClassifier("five stages", **settings)
    probe = clone(model).set_params(max_epochs=0).fit(images, y).module_.state_dict()
    trained = clone(model).set_params(wise_ft_alpha=1.0).fit(images, y)
    interpolated = clone(model).set_params(wise_ft_alpha=alpha).fit(images, y)
    assert interpolated.loss_curve_ == trained.loss_curve_
    for name, end in trained.module_.state_dict().items():
        expected = (1 - alpha) * probe[name].double() + alpha * end.double()
        got = interpolated.module_.state_dict()[name].double()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_image_of_weight_0_is_not_read(paths, y, tmp_path):
    weight = np.ones(40)
    weight[5] = 0
    rows = [*paths[:5], str(tmp_path / "gone.png"), *paths[6:]]
    classifier = make_classifier(checkpoint=tmp_path / "run")
    assert classifier.fit(rows, y, sample_weight=weight).n_iter_ == 2
    rows[7] = str(tmp_path / "gone too.png")
    with pytest.raises(ValueError, match=r"X\[7\]"):
        make_classifier().fit(rows, y, sample_weight=weight)


def test_parameters_of_numpy_types(images, y, tmp_path):
    classifier = make_classifier(
        lr=np.float32(1e-3),
        max_epochs=np.int64(2),
        unfreeze_every=np.int64(1),
        image_size=np.int64(20),
        hidden_layer_sizes=np.array([4]),
        checkpoint=tmp_path / "run",
    ).fit(images, y)
    second = clone(classifier).set_params(max_epochs=2, unfreeze_every=1)
    assert second.fit(images, y).history_ == classifier.history_
    classifier.save(tmp_path / "model.safetensors")
    loaded = FineTunedCNNClassifier.load(tmp_path / "model.safetensors")
    assert loaded.image_size == 20


def test_networks_of_equal_weights_and_different_stride(images, y):
    def make_network(stride):
        network = TinyNet()
        network.stages["stage1"][0].stride = stride
        return network

    for stride in (1, 2):
        register_backbone(
            f"tiny{stride}",
            lambda stride=stride: make_network(stride),
            preprocessing=Preprocessing(16, 16),
        )
    proba = [
        FineTunedCNNClassifier(
            f"tiny{stride}", head_init="random", max_epochs=0, random_state=0
        )
        .fit(images, y)
        .predict_proba(images)
        for stride in (1, 2)
    ]
    assert not np.allclose(*proba, atol=1e-4)


@pytest.mark.slow
def test_halving_search_over_epochs(images, y):
    search = HalvingGridSearchCV(
        make_classifier(head_init="random"),
        {"lr": [1e-4, 1e-2]},
        resource="max_epochs",
        max_resources=4,
        min_resources=2,
        factor=2,
        cv=2,
        random_state=0,
    ).fit(images, y)
    assert search.n_resources_ == [2, 4]
    assert search.best_estimator_.n_iter_ == 4


def test_linear_probe_shares_cached_features_with_pretrained_features(
    paths, y, tmp_path, monkeypatch
):
    PretrainedFeatures("tiny", memory=tmp_path).fit_transform(paths)
    computed = []
    monkeypatch.setattr(
        "sktl._inference.cached_forward.batches", lambda *a, **k: computed.append(a)
    )
    classifier = make_classifier(memory=tmp_path, max_epochs=0, engine="auto")
    classifier.fit(paths, y)
    assert computed == []
    assert classifier.history_[0]["train_loss"] > 0


def test_partial_fit_continues_the_training(images, y):
    classes = ["china", "flower"]
    classifier = make_classifier(lr=1e-3, trainable="head")
    for epoch in range(1, 4):
        assert classifier.partial_fit(images, y, classes=classes) is classifier
        assert classifier.n_iter_ == epoch
    once = make_classifier(
        lr=1e-3, trainable="head", max_epochs=3, lr_schedule="constant"
    )
    once.set_params(wise_ft_alpha=1.0).fit(images, y)
    assert once.loss_curve_ == classifier.loss_curve_
    np.testing.assert_array_equal(
        once.predict_proba(images), classifier.predict_proba(images)
    )


LABELS = ["china", "flower"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_partial_fit_after_a_change_of_trainable(images, y, optimizer):
    classifier = make_classifier(optimizer=optimizer).partial_fit(
        images, y, classes=LABELS
    )
    for trainable, trained in (
        ("head", {"head"}),
        ("all", {"stem", "stage1", "head"}),
        (1, {"stage1", "head"}),
    ):
        before = copy.deepcopy(classifier.module_)
        classifier.set_params(trainable=trainable).partial_fit(images, y)
        after = dict(classifier.module_.named_parameters())
        changed = [n for n, p in before.named_parameters() if not p.equal(after[n])]
        assert {name.split(".")[0] for name in changed} == trained


def test_partial_fit_with_some_of_the_classes(images, y):
    classifier = make_classifier()
    with pytest.raises(ValueError, match="first call of partial_fit"):
        classifier.partial_fit(images, y)
    classifier.partial_fit(images[:8], y[:8], classes=["bird", "china", "flower"])
    assert list(classifier.classes_) == ["bird", "china", "flower"]
    classifier.partial_fit(images, y)
    with pytest.raises(
        ValueError, match=r"must contain only the classes .* Got \['cat'\]"
    ):
        classifier.partial_fit(images, np.repeat(["cat", "china"], 20))
    with pytest.raises(
        ValueError, match="partial_fit must get the classes of the first fit"
    ):
        classifier.partial_fit(images, y, classes=["china", "flower"])
    with pytest.raises(ValueError, match="early_stopping must be False"):
        make_classifier(early_stopping=True).partial_fit(
            images, y, classes=np.unique(y)
        )


def test_warm_start_continues_from_the_last_weights(images, y):
    classifier = make_classifier(warm_start=True, head_init="random", lr=1e-2).fit(
        images, y
    )
    first = classifier.loss_curve_
    before = classifier.module_
    second = classifier.fit(images, y).loss_curve_
    assert len(second) == 2
    assert second[0] < first[0]
    assert classifier.module_ is not before
    with pytest.raises(
        ValueError, match="warm_start must get the classes of the first fit"
    ):
        classifier.fit(images, np.repeat(["a", "b"], 20))


def test_early_stopping_keeps_the_best_epoch(images, y):
    classifier = make_classifier(
        early_stopping=True,
        validation_fraction=0.25,
        max_epochs=12,
        n_iter_no_change=3,
        lr=1e-3,
    ).fit(images, y)
    ranks = [
        (round(row["valid_score"], 6), -row["valid_loss"])
        for row in classifier.history_
    ]
    assert classifier.best_epoch_ == ranks.index(max(ranks))
    assert classifier.n_iter_ == min(12, classifier.best_epoch_ + 3)
    assert len(classifier.validation_scores_) == classifier.n_iter_
    # The weights are those after that epoch, not the last ones.
    constant = clone(classifier).set_params(lr_schedule="constant").fit(images, y)
    shorter = clone(constant).set_params(max_epochs=constant.best_epoch_)
    np.testing.assert_array_equal(
        constant.predict_proba(images), shorter.fit(images, y).predict_proba(images)
    )


def test_hidden_layers_are_initialized_by_a_perceptron(images, y):
    classifier = make_classifier(hidden_layer_sizes=(8, 4), max_epochs=0).fit(images, y)
    widths = [m.out_features for m in classifier.module_[-1] if hasattr(m, "weight")]
    assert widths == [8, 4, 2]
    assert classifier.score(images, y) > 0.9
    assert clone(classifier).set_params(hidden_layer_sizes=8).fit(images, y)
    for invalid in ([0], [2.5], ["3"]):
        with pytest.raises(ValueError, match="'hidden_layer_sizes' parameter must be"):
            make_classifier(hidden_layer_sizes=invalid).fit(images, y)


def test_plot_history(images, y):
    plt = pytest.importorskip("matplotlib.pyplot")
    classifier = make_classifier(early_stopping=True, max_epochs=3).fit(images, y)
    ax = classifier.plot_history()
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["train_loss"][1:], classifier.loss_curve_)
    assert list(lines["valid_score"][1:]) == classifier.validation_scores_
    assert classifier.plot_history(ax) is ax
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"trainable": "stage9"}, "one of the stages"),
        ({"trainable": 3}, "from 0 to 2"),
        ({"lr": 0}, "'lr' parameter"),
        ({"augmentation": "blur"}, "'augmentation' parameter"),
        ({"precision": "float16"}, "'precision' parameter"),
        ({"augmentation": lambda image: None}, "PIL image"),
    ],
)
def test_invalid_parameters(images, y, parameters, reason):
    with pytest.raises((ValueError, TypeError), match=reason):
        make_classifier(**parameters).fit(images, y)


def test_invalid_image(paths, y, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    rows = [*paths[:5], str(bad), *paths[6:]]
    for head_init in ("random", "linear_probe"):
        with pytest.raises(ValueError, match=r"X\[5\].*bad\.png"):
            make_classifier(head_init=head_init).fit(rows, y)


@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_weights_without_a_head(images, y, tmp_path, head_init):
    state = TinyNet().state_dict()
    torch.save(state, tmp_path / "full.pth")
    body = {f"backbone.{n}": v for n, v in state.items() if not n.startswith("head.")}
    torch.save({"teacher": body, "epoch": 3}, tmp_path / "body.ckpt")
    expected, got = (
        make_classifier(weights=tmp_path / name, head_init=head_init).fit(images, y)
        for name in ("full.pth", "body.ckpt")
    )
    np.testing.assert_array_equal(
        got.predict_proba(images), expected.predict_proba(images)
    )
    got.save(tmp_path / "saved")
    np.testing.assert_array_equal(
        FineTunedCNNClassifier.load(tmp_path / "saved").predict_proba(images),
        expected.predict_proba(images),
    )


@pytest.mark.slow
class TestAntsAndBees:
    @pytest.fixture
    def network(self, test_data):
        return {
            "backbone": "squeezenet1_1",
            "weights": test_data / "weights" / "squeezenet1_1-imagenet.pth",
            "precision": "auto",
        }

    @pytest.fixture
    def data(self, test_data):
        parts = (test_data / "hymenoptera" / part for part in ("train", "val"))
        return [load_files(part, load_content=False) for part in parts]

    def test_defaults_are_no_worse_than_the_linear_probe(self, network, data):
        train, val = data
        # Smaller images and fewer epochs than by default, to save time.
        classifier = FineTunedCNNClassifier(
            **network, image_size=112, max_epochs=4, random_state=0
        )
        scores = []
        for each in (classifier, clone(classifier).set_params(max_epochs=0)):
            each.fit(train.filenames, train.target)
            scores.append(each.score(val.filenames, val.target))
        assert classifier.selection_
        assert scores[1] > 0.8
        assert scores[0] > scores[1] - 2 / 153  # two of the 153 images


def test_cross_validation_in_a_pipeline(paths, y):
    scores = cross_val_score(
        make_pipeline(make_classifier(max_epochs=1)), paths, y, cv=2
    )
    assert scores.shape == (2,)


@pytest.mark.parametrize("augmentation", [None, "standard"])
def test_network_of_one_channel(images, y, tmp_path, augmentation):
    classifier = make_classifier(
        backbone="grey",
        trainable=1,
        memory=tmp_path / "cache",
        augmentation=augmentation,
    ).fit(images, y)
    weight = classifier.module_.get_parameter("stem.0.weight")
    assert weight.shape == (8, 1, 3, 3)
    classifier.save(tmp_path / "grey.safetensors")
    loaded = FineTunedCNNClassifier.load(tmp_path / "grey.safetensors")
    expected = classifier.predict_proba(images)
    # The frozen stem is read from the cache by one of them, and fused by the other.
    np.testing.assert_allclose(loaded.predict_proba(images), expected, atol=1e-6)
    grey = images @ [0.299, 0.587, 0.114]
    as_grey = np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)
    assert np.abs(loaded.predict_proba(as_grey) - expected).max() < 0.01


class TestSeveralLabels:
    @pytest.fixture
    def Y(self, images):
        """Return two labels: the photograph, and whether a tile is bright."""
        brightness = images.mean(axis=(1, 2, 3))
        bright = brightness > np.median(brightness)
        return np.column_stack([np.repeat([0, 1], 20), bright.astype(int)])

    def test_epoch_0_is_one_logistic_regression_per_label(self, images, Y):
        classifier = make_classifier(max_epochs=0).fit(images, Y)
        proba = classifier.predict_proba(images)
        assert proba.shape == (40, 2)
        x = PretrainedFeatures("tiny").transform(images).astype(float)
        x = StandardScaler().fit_transform(x)
        for column, label in zip(proba.T, Y.T, strict=True):
            errors = [
                np.abs(
                    LogisticRegression(C=C).fit(x, label).predict_proba(x)[:, 1]
                    - column
                ).max()
                for C in C_GRID
            ]
            assert min(errors) < 1e-3

    @pytest.mark.parametrize("augmentation", [None, "flip"])
    def test_training_reduces_the_loss(self, images, Y, augmentation):
        classifier = make_classifier(
            max_epochs=6, wise_ft_alpha=1.0, lr=1e-3, augmentation=augmentation
        ).fit(images, Y)
        losses = [row["train_loss"] for row in classifier.history_]
        assert losses[-1] < losses[0]
        predicted = classifier.predict(images)
        proba = classifier.predict_proba(images)
        np.testing.assert_array_equal(predicted, proba > 0.5)
        np.testing.assert_array_equal(
            predicted, classifier.decision_function(images) > 0
        )
        assert (predicted == Y).mean() > 0.8
        assert classifier.score(images, Y) == accuracy_score(Y, predicted)
        assert classifier.classes_.tolist() == [0, 1]

    @pytest.mark.parametrize(
        "convert",
        [sparse.csr_matrix, pd.DataFrame, np.ndarray.tolist, lambda y: y.astype(bool)],
    )
    def test_every_form_of_y_gives_equal_bits(self, images, Y, convert):
        expected = make_classifier(max_epochs=1).fit(images, Y)
        got = make_classifier(max_epochs=1).fit(images, convert(Y))
        np.testing.assert_array_equal(
            got.predict_proba(images), expected.predict_proba(images)
        )
        assert got.predict(images).dtype == np.int64

    @pytest.mark.parametrize("class_weight", ["balanced", {1: 0}, [{}, {1: 3}], None])
    def test_labels_that_never_or_always_occur(self, images, Y, class_weight):
        Y = np.column_stack([Y, np.zeros(40), np.ones(40), np.arange(40) == 7])
        if isinstance(class_weight, list):
            class_weight = class_weight + [{}] * 3
        classifier = make_classifier(
            max_epochs=1,
            class_weight=class_weight,
            early_stopping=True,
            lr="auto",
        ).fit(images, Y)
        assert not classifier.predict(images)[:, 2].any()
        assert np.isfinite(classifier.predict_proba(images)).all()

    @pytest.mark.parametrize("options", [{}, {"early_stopping": True}])
    def test_settings_are_selected(self, images, Y, options):
        auto = {"lr": "auto", "head_init": "auto", "wise_ft_alpha": "auto"}
        classifier = make_classifier(**auto, **options).fit(images, Y)
        assert len(classifier.selection_) >= 2
        assert all(np.isfinite(row["valid_loss"]) for row in classifier.selection_)

    def test_scorers_of_scikit_learn(self, images, Y):
        classifier = make_classifier(max_epochs=0)
        scoring = ["roc_auc", "average_precision", "f1_macro", "accuracy"]
        cv = KFold(2, shuffle=True, random_state=0)
        scores = cross_validate(classifier, images, Y, scoring=scoring, cv=cv)
        for name in scoring:
            assert (scores[f"test_{name}"] > 0.2).all()
        proba = cross_val_predict(classifier, images, Y, method="predict_proba", cv=cv)
        assert proba.shape == (40, 2)

    def test_save_load_pickle_and_backbone(self, images, Y, tmp_path):
        file = tmp_path / "model.safetensors"
        weights = [{}, {1: 2.0}]
        classifier = make_classifier(class_weight=weights).fit(images, Y)
        classifier.save(file)
        loaded = FineTunedCNNClassifier.load(file)
        assert list(loaded.class_weight) == weights
        for copied in (loaded, pickle.loads(pickle.dumps(classifier))):
            np.testing.assert_array_equal(
                copied.predict_proba(images), classifier.predict_proba(images)
            )
        loaded.set_params(warm_start=True).fit(images, Y)
        again = make_classifier(weights=file, max_epochs=0).fit(images, Y[:, 0])
        assert again.classes_.tolist() == [0, 1]
        with pytest.raises(ValueError, match="categories"):
            PretrainedClassifier("tiny", weights=file).fit(images)

    def test_resumed_run_has_equal_bits(self, images, Y, tmp_path):
        options = {"max_epochs": 3, "dropout": 0.3, "lr": "auto"}
        expected = make_classifier(**options).fit(images, Y)
        classifier = make_classifier(**options, checkpoint=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            clone(classifier).set_params(callbacks=[StopAt(2)]).fit(images, Y)
        classifier.fit(images, Y)
        assert classifier.history_ == expected.history_
        np.testing.assert_array_equal(
            classifier.predict_proba(images), expected.predict_proba(images)
        )

    def test_partial_fit_needs_no_classes(self, images, Y):
        classifier = make_classifier()
        for rows in (slice(0, 20), slice(20, 40)):  # one value of the first label
            classifier.partial_fit(images[rows], Y[rows])
        assert classifier.n_iter_ == 2
        classifier.partial_fit(images, Y, classes=["china", "bright"])
        with pytest.raises(ValueError, match=r"which had 2 columns\. Got 3"):
            classifier.partial_fit(images, np.column_stack([Y, Y[:, 0]]))
        with pytest.raises(ValueError, match="which is multilabel"):
            classifier.partial_fit(images, Y[:, 0], classes=[0, 1])

    def test_one_network_is_as_good_as_one_for_each_label(self, images, Y):
        both = make_classifier(max_epochs=0).fit(images, Y).predict(images)
        for column, label in zip(both.T, Y.T, strict=True):
            alone = make_classifier(max_epochs=0).fit(images, label)
            assert (alone.predict(images) == column).mean() > 0.9

    def test_callbacks_get_the_indicator_matrix(self, images, Y):
        seen = []

        class Record(Callback):
            def on_batch_end(self, net, batch=None, training=False, **kwargs):
                seen.extend(batch[1].tolist())

        scoring = EpochScoring("f1_macro", on_train=True, lower_is_better=False)
        classifier = make_classifier(callbacks=[Record(), scoring], max_epochs=1)
        classifier.fit(images, Y)
        assert sorted(seen) == sorted(Y.tolist())
        assert 0 <= classifier.net_.history[-1, "f1_macro"] <= 1

    @pytest.mark.parametrize(
        ("y", "reason"),
        [
            ([["a", "x"], ["b", "y"]] * 20, "MultiOutputClassifier"),
            ([[0, 2], [1, 0]] * 20, r"y\[0, 1\] = 2.*MultiOutputClassifier"),
            ([["a"], ["a", "b"]] * 20, "MultiLabelBinarizer"),
            ([[0.5, 2], [1, 0]] * 20, "FineTunedCNNRegressor"),
        ],
    )
    def test_other_targets_are_refused_with_advice(self, images, y, reason):
        with pytest.raises(ValueError, match=reason):
            make_classifier().fit(images, y)

    def test_several_columns_of_classes(self, images, y):
        columns = np.column_stack([y, np.tile(["a", "b"], 20)])
        model = MultiOutputClassifier(make_classifier(max_epochs=0))
        assert model.fit(images, columns).predict(images).shape == (40, 2)

    def test_list_of_class_weights_needs_several_labels(self, images, y):
        with pytest.raises(ValueError, match="one label per image"):
            make_classifier(class_weight=[{}]).fit(images, y)
