"""Tests of callbacks of scikit-learn, which has them since 1.9."""

import copy
import importlib.util
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import accuracy_score, get_scorer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from trainer_helpers import TARGETS, Y, equal_bits, make_classifier, make_estimator

from sktl._training.fit_tasks import FitTasks
from sktl._utils import sklearn_compat

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

NOISY = np.where(np.arange(40) % 7 == 3, 1 - Y, Y)


class Recorder:
    """Callback that records its calls, and may stop the training."""

    def __init__(self, stop_at=None):
        self.calls, self.fitted, self.stop_at = [], [], stop_at

    def setup(self, estimator, context):
        self.calls.append("setup")

    def teardown(self, estimator, context):
        self.calls.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.calls.append(f"begin {context.task_name}")

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None, X=None):
        self.calls.append(f"end {context.task_name}")
        self.fitted.append(fitted_estimator)
        return context.task_name == "epoch" and context.task_id + 1 == self.stop_at


@pytest.fixture
def callbacks():
    """Return the module of the callbacks, or skip the test without it."""
    return pytest.importorskip("sklearn.callback")


def test_epochs_are_tasks(images, callbacks):
    estimator = make_classifier(lr="auto", wise_ft_alpha=0.5).set_callbacks(
        recorder := Recorder()
    )
    expected = clone(estimator).set_callbacks().fit(images, NOISY)
    estimator.fit(images, NOISY)
    epochs = ["begin epoch", "end epoch"] * 3
    assert recorder.calls == ["setup", "begin fit", *epochs, "end fit", "teardown"]
    assert equal_bits(estimator.module_, expected.module_)
    assert estimator.history_ == expected.history_
    assert not [name for name in vars(estimator) if name.startswith("_callback")]


@pytest.mark.parametrize(
    "early_stopping", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_fitted_estimators_are_as_if_the_training_had_ended(
    images, callbacks, early_stopping
):
    options = {
        "backbone": "five stages",
        "weights": "DEFAULT",
        "trainable": 2,
        "early_stopping": early_stopping,
        "lr": 0.01,
        "lr_schedule": "constant",
        "image_shape": images.shape[1:],
    }
    X = images.reshape(40, -1)
    estimator = make_classifier(**options).set_callbacks(recorder := Recorder())
    estimator.fit(X, NOISY)
    *epochs, last = recorder.fitted
    for n_epochs, fitted in enumerate(epochs, 1):
        expected = clone(estimator).set_callbacks().set_params(max_epochs=n_epochs)
        expected.fit(X, NOISY)
        assert fitted.history_ == expected.history_
        assert fitted.n_iter_ == n_epochs
        assert equal_bits(fitted.module_, expected.module_)
        np.testing.assert_array_equal(fitted.predict(X), expected.predict(X))
    assert equal_bits(last.module_, estimator.module_)


def test_a_callback_may_stop_the_training(images, callbacks):
    estimator = make_classifier().set_callbacks(Recorder(stop_at=2))
    assert estimator.fit(images, Y).n_iter_ == 2
    assert estimator.max_epochs == 3


def test_callbacks_are_torn_down_after_an_error(images, callbacks):
    estimator = make_classifier(lr=1e30, batch_size=8).set_callbacks(
        recorder := Recorder()
    )
    with pytest.raises(ValueError, match="must be finite"):
        estimator.fit(images, Y)
    assert recorder.calls == ["setup", "begin fit", "begin epoch", "teardown"]
    assert not hasattr(estimator, "history_")


def test_scoring_monitor(images, callbacks):
    monitor = callbacks.ScoringMonitor(scoring="accuracy")
    weight = np.linspace(0.5, 2, 40)
    estimator = make_classifier().set_callbacks(monitor)
    estimator.fit(images, NOISY, sample_weight=weight)
    rows = monitor.get_logs().data
    names = [row["task_name"] for row in rows]
    assert names == ["fit", "epoch", "epoch", "epoch"]
    expected = accuracy_score(NOISY, estimator.predict(images), sample_weight=weight)
    assert rows[0]["accuracy"] == rows[-1]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "scoring"),
    [("several labels", "f1_macro"), ("numbers", "neg_mean_absolute_error")],
)
def test_scoring_monitor_of_several_columns(images, callbacks, target, scoring):
    y = TARGETS[target]
    monitor = callbacks.ScoringMonitor(scoring=scoring)
    estimator = make_estimator(target, max_epochs=2).set_callbacks(monitor)
    estimator.fit(images, y)
    rows = monitor.get_logs().data
    assert [row["task_name"] for row in rows] == ["fit", "epoch", "epoch"]
    expected = get_scorer(scoring)(estimator, images, y)
    assert rows[0][scoring] == rows[-1][scoring] == pytest.approx(expected)


@pytest.mark.parametrize(
    "in_pipeline", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_scoring_monitor_in_a_grid_search(images, callbacks, in_pipeline):
    monitor = callbacks.ScoringMonitor(scoring=["accuracy", "neg_log_loss"])
    estimator = make_classifier(max_epochs=2).set_callbacks(monitor)
    grid = {"lr": [1e-3, 1e-2]}
    if in_pipeline:
        estimator = make_pipeline(estimator)
        grid = {"finetunedcnnclassifier__lr": [1e-3, 1e-2]}
    search = GridSearchCV(estimator, grid, cv=2).fit(images, NOISY)
    rows = monitor.get_logs().data
    epochs = [row for row in rows if row["task_name"] == "epoch"]
    assert len(epochs) == 2 * (4 + 1)
    assert len({row["parent_task_id_path"] for row in epochs}) == 5
    assert search.best_score_ > 0


@pytest.mark.parametrize("in_search", [False, True])
def test_progress_bar(images, callbacks, in_search, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "160")
    estimator = make_classifier(max_epochs=2)
    if in_search:
        estimator = GridSearchCV(estimator, {"lr": [1e-3, 1e-2]}, cv=2)
    estimator.set_callbacks(callbacks.ProgressBar()).fit(images, Y)
    text = capsys.readouterr().out
    assert "FineTunedCNNClassifier - fit" in text
    assert "100%" in text


def test_partial_fit_and_copies(images, callbacks):
    estimator = make_classifier().set_callbacks(recorder := Recorder())
    estimator.partial_fit(images, Y, classes=[0, 1])
    assert recorder.calls == []
    assert copy.copy(estimator).fit(images, Y).n_iter_ == 3
    assert len(recorder.calls) == 2 + 2 + 2 * 3


def test_below_scikit_learn_1_9(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.callback", None)
    spec = importlib.util.spec_from_file_location("old", sklearn_compat.__file__)
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert not hasattr(old.CallbackSupportMixin, "set_callbacks")
    monkeypatch.setattr(
        "sktl._training.fit_tasks.init_callback_context", old.init_callback_context
    )

    class Estimator(old.CallbackSupportMixin):
        max_epochs = 3

    tasks = FitTasks(Estimator(), images, Y, None, to_attributes=None)
    tasks.begin_epoch()
    assert tasks.end_epoch(None) is False
    tasks.end()
