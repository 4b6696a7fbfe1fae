"""Tests of a validation set that is passed to `fit`."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from trainer_helpers import (
    TARGETS,
    default_score,
    each_target,
    equal_bits,
    make_classifier,
    make_estimator,
    make_parts,
)

from sktl._training.validation_set import errors_of

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

Y = np.repeat(["a", "b"], 20)
HARD = np.repeat(["a", "b"], 20)[np.arange(40) * 7 % 40]  # hard to learn


def make_stopping(**parameters):
    return make_classifier(early_stopping=True, **{"lr": 0.01, **parameters})


@pytest.mark.parametrize(
    ("trainable", "lr"),
    [
        ("all", 0.01),
        pytest.param("all", "auto", marks=pytest.mark.slow),
        ("head", "auto"),
    ],
)
def test_equals_the_fit_that_holds_out_the_same_images(images, trainable, lr):
    options = {"trainable": trainable, "lr": lr, "weights": "DEFAULT"}
    expected = make_stopping(validation_fraction=0.25, **options).fit(images, HARD)
    parts = make_parts(images, HARD, validation_fraction=0.25, early_stopping=True)
    mask = parts.data.held_out
    classifier = make_stopping(**options).fit(
        images[~mask], HARD[~mask], X_val=list(images[mask]), y_val=HARD[mask]
    )
    assert equal_bits(classifier.module_, expected.module_)
    assert classifier.validation_scores_ == expected.validation_scores_
    assert classifier.best_epoch_ == expected.best_epoch_
    assert classifier.lr_ == expected.lr_


def test_scores_are_those_of_the_validation_set(images, paths):
    weight = np.arange(10.0)
    classifier = make_stopping(max_epochs=2).fit(
        images[:35],
        HARD[:35],
        X_val=paths[30:],
        y_val=HARD[30:].tolist(),
        sample_weight_val=weight,
    )
    predicted = classifier.predict(images[30:])
    score = classifier.history_[classifier.best_epoch_]["valid_score"]
    expected = accuracy_score(HARD[30:], predicted, sample_weight=weight)
    assert score == pytest.approx(expected)
    loss = -np.log(classifier.predict_proba(paths[30:]).max(axis=1))
    right = predicted == HARD[30:]
    loss[~right] = -np.log(classifier.predict_proba(paths[30:]).min(axis=1))[~right]
    got = classifier.history_[classifier.best_epoch_]["valid_loss"]
    assert got == pytest.approx(np.average(loss, weights=weight), rel=1e-4)


@each_target
def test_each_kind_of_target(images, target):
    y, weight = TARGETS[target], np.arange(40.0)
    estimator = make_estimator(target, early_stopping=True, lr=0.01, max_epochs=2)
    estimator.fit(
        images[:30], y[:30], X_val=images, y_val=y.tolist(), sample_weight_val=weight
    )
    got = estimator.history_[estimator.best_epoch_]["valid_score"]
    assert got == pytest.approx(default_score(y, estimator.predict(images), weight))
    assert len(estimator.validation_scores_) == 2
    with pytest.raises(ValueError, match="y_val"):
        estimator.fit(images, y, X_val=images[:3], y_val=np.zeros((3, 4)))


def test_class_weights_of_several_labels_apply_to_the_validation_set(images):
    y = TARGETS["several labels"]
    weights = [{0: 3, 1: 1}, {0: 0, 1: 2}]
    estimator = make_stopping(class_weight=weights, max_epochs=1).fit(
        images[:30], y[:30], X_val=images, y_val=y
    )
    expected = np.average(
        estimator.predict(images) == y,
        weights=np.where(y, [1, 2], [3, 0]),
    )
    score = estimator.history_[estimator.best_epoch_]["valid_score"]
    assert score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "y_val", "reason"),
    [
        ("numbers", [[1, 2], [3, np.nan], [5, 6]], r"y_val\[1, 1\]"),
        ("numbers", [[1], [2], [3]], "y_val must have as many columns as y, 2. Got 1"),
        ("several labels", [0, 1, 0], "y_val must be an indicator matrix"),
        ("several labels", np.ones((3, 3)), "as many columns as y, 2. Got 3"),
        ("several labels", [[0, 1], [0, 2], [1, 1]], r"y_val\[1, 1\]"),
    ],
)
def test_invalid_targets_of_several_columns(images, target, y_val, reason):
    estimator = make_estimator(target, early_stopping=True)
    with pytest.raises(ValueError, match=reason):
        estimator.fit(images, TARGETS[target], X_val=images[:3], y_val=y_val)


def test_class_weights_apply_to_the_validation_set(images):
    classifier = make_stopping(class_weight={"a": 3, "b": 1}, max_epochs=1).fit(
        images, Y, X_val=images, y_val=HARD
    )
    weight = np.where(HARD == "a", 3, 1)
    score = classifier.history_[classifier.best_epoch_]["valid_score"]
    predicted = classifier.predict(images)
    expected = accuracy_score(HARD, predicted, sample_weight=weight)
    assert score == pytest.approx(expected)


def test_one_class_is_enough(images):
    classifier = make_stopping(max_epochs=1)
    classifier.fit(images, Y, X_val=images[:5], y_val=Y[:5])
    assert len(classifier.validation_scores_) == 1


def test_flattened_images_beside_files(images, paths):
    rows = images[..., 0].reshape(40, -1)
    options = {"X_val": rows[:9], "y_val": Y[:9]}
    classifier = make_stopping(image_shape=(24, 32), max_epochs=1)
    got = classifier.fit(paths, Y, **options).history_
    options["X_val"] = images[:9, ..., 0]
    assert got == clone(classifier).fit(images, Y, **options).history_


@pytest.mark.parametrize(
    ("y", "y_val", "reason"),
    [
        (Y, ["a", "c", "b"], r"y_val\[1\] is 'c', which is none of the classes"),
        (Y, ["a", "b", None], r"y_val\[2\] is missing"),
        (Y, ["a", "b"], "one target for each image of X_val. Got 2 targets and 3"),
        (Y == "a", [0.0, np.nan, 1.0], r"y_val\[1\] is missing \(nan\)"),
        (Y == "a", [0.0, 1.0, np.inf], r"y_val\[2\] is inf"),
        ((Y == "a") + 0, ["0", "1", "0"], r"y_val\[0\] is '0', which is none"),
        ((Y == "a") + 0, [0, 1, -1], r"y_val\[2\] is -1, which is none"),
        (Y, None, "must be passed to fit together. Got X_val"),
        (Y, [["a", "b"]] * 3, "y_val is invalid"),
    ],
)
def test_invalid_targets(images, y, y_val, reason):
    with pytest.raises(ValueError, match=reason):
        make_stopping().fit(images, y, X_val=images[:3], y_val=y_val)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"y_val": Y[:3]}, "must be passed to fit together. Got y_val"),
        ({"sample_weight_val": [1]}, "together. Got sample_weight_val"),
        ({"sample_weight_val": [1, -1, 1]}, "sample_weight_val is invalid"),
        ({"sample_weight_val": [1, 1]}, "sample_weight_val is invalid"),
        ({"sample_weight_val": [0, 0, 0]}, "sample_weight_val is invalid"),
        ({"X_val": [1, 2, 3]}, "X_val is invalid: Expected 2D array"),
        ({"X_val": "a.png"}, "X_val is invalid"),
    ],
)
def test_invalid_arguments(images, arguments, reason):
    if "y_val" not in arguments and arguments.get("sample_weight_val") != [1]:
        arguments = {"X_val": images[:3], "y_val": Y[:3], **arguments}
    with pytest.raises((TypeError, ValueError), match=reason):
        make_stopping().fit(images, Y, **arguments)


def test_class_weights_of_0_for_all_images(images):
    with pytest.raises(ValueError, match="must have an image of positive weight"):
        make_stopping(class_weight={"a": 0, "b": 1}).fit(
            images, Y, X_val=images[:3], y_val=Y[:3]
        )


def test_early_stopping_is_required(images):
    with pytest.raises(ValueError, match="early_stopping=True, or leave out"):
        make_classifier().fit(images, Y, X_val=images[:4], y_val=Y[:4])


def test_unreadable_image_is_named(images, paths, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image X_val\[1\] \('.*bad.png'\)"):
        make_stopping().fit(paths, Y, X_val=[paths[0], bad], y_val=["a", "b"])


def test_image_of_weight_0_is_not_read(images, paths):
    rows = {"X_val": [paths[0], "gone.png"], "y_val": ["a", "b"]}
    classifier = make_stopping(max_epochs=1)
    assert classifier.fit(images, Y, **rows, sample_weight_val=[1, 0]).n_iter_ == 1


def test_checkpoint_belongs_to_the_validation_set(images, tmp_path):
    classifier = make_stopping(max_epochs=1, checkpoint=tmp_path)
    classifier.fit(images, Y, X_val=images[:4], y_val=Y[:4])
    with pytest.raises(ValueError, match=r"differs in X \(.*X_val"):
        classifier.fit(images, Y)
    with pytest.raises(ValueError, match="differs in y "):
        classifier.fit(images, Y, X_val=images[:4], y_val=Y[-4:])
    with pytest.raises(ValueError, match="differs in X "):
        classifier.fit(images, Y, X_val=images[1:5], y_val=Y[:4])


def test_errors_are_named_once():
    with pytest.raises(TypeError, match=r"^y_val is invalid: no"), errors_of("y_val"):
        raise TypeError("no")
    with pytest.raises(ValueError, match=r"^y_val\[1\]"), errors_of("y_val"):
        raise ValueError("y_val[1] is bad")
