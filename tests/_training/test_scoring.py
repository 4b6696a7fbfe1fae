"""Tests of the score that early stopping watches."""

from functools import partial

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    make_scorer,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from trainer_helpers import (
    TARGETS,
    default_score,
    equal_bits,
    make_classifier,
    make_estimator,
    make_parts,
)

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

# The loss falls and then rises.
NOISY = np.where(np.arange(40) % 7 == 3, 1, 0) ^ np.repeat([0, 1], 20)
LABELS = np.array(["no", "yes"])[NOISY]
LOG_LOSS = make_scorer(
    log_loss, greater_is_better=False, response_method="predict_proba"
)


def make_stopping(scoring, **parameters):
    options = {
        "early_stopping": True,
        "validation_fraction": 0.4,
        "max_epochs": 6,
        "n_iter_no_change": 6,
        "lr": 0.1,
        "lr_schedule": "onecycle",
    }
    return make_classifier(scoring=scoring, **{**options, **parameters})


def scores(classifier):
    return [row["valid_score"] for row in classifier.history_]


def count_errors(estimator, X, y):
    """Scorer that is no object of scikit-learn."""
    assert estimator.predict(X[:3]).shape == (3,)
    return -int((estimator.predict(X) != y).sum())


SCORINGS = [
    "loss",
    "roc_auc",
    count_errors,
    *(
        pytest.param(scoring, marks=pytest.mark.slow)
        for scoring in ("neg_log_loss", "accuracy", "balanced_accuracy", LOG_LOSS)
    ),
]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_best_epoch_has_the_best_score(images, scoring):
    classifier = make_stopping(scoring).fit(images, LABELS)
    recorded = scores(classifier)
    assert recorded[classifier.best_epoch_] == max(recorded)
    assert len(recorded) == 7
    numbers = clone(classifier).fit(images, NOISY)
    assert numbers.history_ == classifier.history_
    assert equal_bits(numbers.module_, classifier.module_)


def test_loss_is_the_negative_log_loss(images):
    by_loss, by_name, by_object = (
        make_stopping(scoring).fit(images, LABELS)
        for scoring in ("loss", "neg_log_loss", LOG_LOSS)
    )
    losses = [row["valid_loss"] for row in by_loss.history_]
    assert by_loss.best_epoch_ == np.argmin(losses)
    assert 0 < by_loss.best_epoch_ < 6
    assert scores(by_loss) == [-loss for loss in losses]
    for other in (by_name, by_object):
        np.testing.assert_allclose(scores(other), scores(by_loss), rtol=1e-5)
        assert equal_bits(other.module_, by_loss.module_)


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_equal_those_of_the_fitted_classifier(images, weighted):
    weight = np.linspace(0.2, 3, 40) if weighted else None
    options = {"max_epochs": 2, "n_iter_no_change": 1}
    parts = make_parts(images, LABELS, early_stopping=True, validation_fraction=0.4)
    valid = parts.data.held_out
    weight_valid = None if weight is None else weight[valid]
    for scoring in ("roc_auc", "f1_macro"):
        classifier = make_stopping(scoring, **options)
        classifier.fit(images, LABELS, sample_weight=weight)
        if scoring == "roc_auc":
            got = classifier.predict_proba(images[valid])[:, 1]
            expected = roc_auc_score(LABELS[valid], got, sample_weight=weight_valid)
        else:
            got = classifier.predict(images[valid])
            expected = f1_score(
                LABELS[valid], got, average="macro", sample_weight=weight_valid
            )
        best = classifier.history_[classifier.best_epoch_]["valid_score"]
        assert best == pytest.approx(expected)


def test_default_is_the_accuracy(images):
    default, accuracy = (
        make_stopping(scoring).fit(images, LABELS) for scoring in (None, "accuracy")
    )
    np.testing.assert_allclose(scores(accuracy), scores(default))
    assert equal_bits(default.module_, accuracy.module_)


@pytest.mark.parametrize(
    ("target", "scoring", "metric"),
    [
        ("several labels", None, default_score),
        ("several labels", "f1_macro", partial(f1_score, average="macro")),
        ("several labels", "accuracy", accuracy_score),
        ("numbers", "r2", r2_score),
        ("numbers", None, r2_score),
        ("numbers", "neg_mean_absolute_error", lambda *y: -mean_absolute_error(*y)),
    ],
)
def test_scores_of_several_columns(images, target, scoring, metric):
    """Scorers of a regressor get numbers in the units of y."""
    y = TARGETS[target]
    options = {"early_stopping": True, "lr": 0.01, "max_epochs": 2}
    estimator = make_estimator(target, scoring=scoring, **options)
    estimator.fit(images[:30], y[:30], X_val=images, y_val=y)
    recorded = scores(estimator)
    assert recorded[estimator.best_epoch_] == max(recorded)
    expected = metric(y, estimator.predict(images))
    assert max(recorded) == pytest.approx(expected, rel=1e-5)


def test_probabilities_of_several_labels(images):
    y = TARGETS["several labels"]
    options = {"early_stopping": True, "lr": 0.01, "max_epochs": 1}
    estimator = make_estimator("several labels", scoring="roc_auc", **options)
    estimator.fit(images[:30], y[:30], X_val=images, y_val=y)
    expected = roc_auc_score(y, estimator.predict_proba(images))
    assert max(scores(estimator)) == pytest.approx(expected)


def test_invalid_scores(images):
    for score in (np.nan, "good", [0.5]):
        with pytest.raises(ValueError, match="must return a finite number"):
            make_stopping(lambda *_, score=score: score).fit(images, LABELS)
    with pytest.raises(ValueError, match="'scoring' parameter of FineTuned"):
        make_stopping("auc").fit(images, LABELS)


@pytest.mark.parametrize("scoring", ["neg_max_error", lambda e, X, y: 0.0])
def test_scorer_without_weights(images, scoring):
    options = {"scoring": scoring, "early_stopping": True, "max_epochs": 1}
    estimator = make_estimator("numbers", **options)
    y, weight = TARGETS["numbers"][:, 0], np.linspace(1, 2, 40)
    with pytest.raises(TypeError, match=r"scoring=.* must take sample_weight, since"):
        estimator.fit(images, y, sample_weight=weight)
    assert estimator.fit(images, y).n_iter_ == 1


def test_scoring_is_saved_and_part_of_a_checkpoint(images, tmp_path):
    classifier = make_stopping("f1_macro", max_epochs=1, checkpoint=tmp_path / "run")
    classifier.fit(images, LABELS).save(tmp_path / "model")
    assert type(classifier).load(tmp_path / "model").scoring == "f1_macro"
    with pytest.raises(ValueError, match=r"differs in scoring \(in the file 'f1_"):
        classifier.set_params(scoring="loss").fit(images, LABELS)
