"""Tests of trainings in real processes: killed, interrupted, distributed.

The processes run `interrupted_training.py`.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import joblib
import numpy as np
import pytest
import torch
from interrupted_training import KINDS, load_data, make_classifier, run_in_a_fork
from shared_fixtures import FIXED
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback

from sktl import FineTunedCNNClassifier
from sktl._training.checkpoint import Checkpoint
from sktl._utils.tensor_file import read_tensors

PROGRAM = Path(__file__).parents[1] / "interrupted_training.py"


def start(directory, name, event):
    command = [sys.executable, "-W", "error", PROGRAM, directory, name, event, "0"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def fork_server():
    """Return a context whose processes start quickly: their imports are done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sktl", "skorch", "sklearn.model_selection"])
    return context


def killed(context, directory, name, event, number):
    """Kill a training at an event; return the number of epochs in its checkpoint."""
    output, pipe = context.Pipe(duplex=False)
    arguments = (pipe, directory, name, event, 0 if event == "seconds" else number)
    process = context.Process(target=run_in_a_fork, args=arguments)
    process.start()
    pipe.close()
    with output:
        if event == "seconds":
            os.read(output.fileno(), 1)  # of "training"
            time.sleep(number)
            process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL or event == "seconds"
    process.close()
    file = directory / "checkpoint" / "fine_tuning.safetensors"
    return read_tensors(file)[1].get("epoch", 0) if file.exists() else 0


# Two rows of kills for each; a run that was killed is resumed, then killed again.
KILLS = {
    "adamw": [[("batch", 9), ("write", 1)], [("epoch", 4), ("seconds", 0.01)]],
    "sgd": [[("gradient", 12), ("write", 2)], [("write", 3), ("gradient", 7)]],
    "stage by stage": [[("epoch", 3), ("batch", 6)], [("batch", 8), ("seconds", 0.1)]],
    "random head": [[("write", 2), ("batch", 11)], [("batch", 14), ("epoch", 2)]],
    "selection": [
        [("selection", 2), ("batch", 9)],
        [("selection", 1), ("selection", 3)],
    ],
    "no random state": [[("batch", 7), ("epoch", 2)], [("gradient", 8), ("write", 2)]],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kills"),
    [
        pytest.param(
            name,
            kills,
            id=f"{name}: {', '.join(event for event, _ in kills)}",
        )
        for name, rows in KILLS.items()
        for kills in rows
    ],
)
def test_killed_training_resumes_to_equal_bits(fork_server, tmp_path, name, kills):
    X, y = load_data()
    epochs = [killed(fork_server, tmp_path, name, *kill) for kill in kills]
    assert epochs == sorted(epochs)
    seed = Checkpoint(tmp_path / "checkpoint").seed(-1)
    estimator = make_classifier(tmp_path, name).fit(X, y)
    expected = make_classifier(tmp_path, name, checkpoint=None)  # never interrupted
    fixed = SimpleNamespace(randint=lambda high: seed)
    with contextlib.ExitStack() as stack:
        if estimator.random_state is None:
            stack.enter_context(
                mock.patch(
                    "sktl._training.build.check_random_state", return_value=fixed
                )
            )
        expected.fit(X, y)
    state = expected.module_.state_dict()
    for part, value in estimator.module_.state_dict().items():
        assert torch.equal(value, state[part])
    assert estimator.history_ == expected.history_
    assert estimator.best_epoch_ == expected.best_epoch_
    assert estimator.selection_ == expected.selection_
    np.testing.assert_array_equal(estimator.predict_proba(X), expected.predict_proba(X))


def test_every_kind_of_training_is_killed():
    assert KILLS.keys() == KINDS.keys()
    assert sum(len(kills) for rows in KILLS.values() for kills in rows) == 24


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.slow
@pytest.mark.parametrize("event", ["interrupt", "search"])
def test_ctrl_c_raises_keyboard_interrupt(tmp_path, event):
    process = start(tmp_path, "sgd", event)
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines == ["training\n", "epoch\n", "epoch\n", "epoch\n"]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "interrupted False"
    if event == "interrupt":
        file = tmp_path / "checkpoint" / "fine_tuning.safetensors"
        n_epochs = 3 + out.count("epoch")
        # The last one may have been interrupted while it was written.
        assert read_tensors(file)[1]["epoch"] in {n_epochs, n_epochs - 1}
        assert os.listdir(file.parent) == [file.name]


class Interrupt(Callback):
    """Raise KeyboardInterrupt in a batch of the third epoch."""

    def on_batch_end(self, net, **rest):
        if len(net.history) == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("shape", ["images", "rows"])
def test_interrupted_estimator_is_not_fitted(tmp_path, shape):
    X, y = load_data()
    X = X if shape == "images" else X[..., 0].reshape(len(X), -1)
    estimator = make_classifier(tmp_path, "sgd", callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(X, y)
    with pytest.raises(NotFittedError):
        estimator.predict(X)
    file = tmp_path / "checkpoint" / "fine_tuning.safetensors"
    assert read_tensors(file)[1]["epoch"] == 2


def test_interrupted_estimator_does_not_change(tmp_path):
    X, y = load_data()
    estimator = make_classifier(tmp_path, "sgd", checkpoint=None).fit(X, y)
    expected, module = estimator.predict_proba(X), estimator.module_
    estimator.set_params(callbacks=[Interrupt()], random_state=9)
    with pytest.raises(KeyboardInterrupt):
        estimator.fit(X, np.where(y == "a", "c", "d"))
    assert estimator.module_ is module
    assert estimator.classes_.tolist() == ["a", "b"]
    np.testing.assert_array_equal(estimator.predict_proba(X), expected)


def test_interrupted_search(tmp_path):
    X, y = load_data()
    estimator = make_classifier(
        tmp_path, "sgd", checkpoint=None, callbacks=[Interrupt()]
    )
    search = GridSearchCV(estimator, {"lr": [0.1, 0.2]}, cv=2, error_score=0.0)
    with pytest.raises(KeyboardInterrupt):
        search.fit(X, y)
    assert not hasattr(search, "best_estimator_")


@pytest.fixture
def bundled(monkeypatch):
    """Return a classifier of a network that worker processes can load."""
    for name in (
        "OMP",
        "OPENBLAS",
        "MKL",
        "BLIS",
        "VECLIB_MAXIMUM",
        "NUMBA",
        "NUMEXPR",
    ):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    settings = {**FIXED, "max_epochs": 1, "batch_size": 20, "random_state": 0}
    settings |= {"image_size": 24}
    return FineTunedCNNClassifier("resnet_mini", trainable=1, **settings)


def count_threads(estimator, X, y):
    return torch.get_num_threads()


def loss(estimator, X, y):
    return float(np.log(estimator.predict_proba(X)[np.arange(len(y)), y]).mean())


@pytest.mark.slow
def test_two_workers_find_the_scores_of_one(bundled, tmp_path):
    X, _ = load_data()
    y = np.repeat([0, 1], 20)
    bundled.set_params(engine="torch", head_init="random")
    grid = [{"lr": [1e-4, 1e-2], "trainable": [1]}, {"trainable": ["all"]}]
    searches = [
        GridSearchCV(
            clone(bundled).set_params(memory=tmp_path / str(n_jobs)),
            grid,
            cv=2,
            scoring={"loss": loss, "threads": count_threads},
            refit=False,
            n_jobs=n_jobs,
        ).fit(X, y)
        for n_jobs in (1, 2)
    ]
    one, two = (search.cv_results_["mean_test_loss"] for search in searches)
    np.testing.assert_allclose(two, one, rtol=1e-3)
    n_threads = set(searches[1].cv_results_["mean_test_threads"])
    assert n_threads == {max(1, joblib.cpu_count() // 2)}


@pytest.mark.slow
def test_workers_predict_after_the_parent(bundled):
    X, _ = load_data()
    fitted = clone(bundled).set_params(max_epochs=0).fit(X, np.repeat([0, 1], 20))
    expected = fitted.predict_proba(X)
    tasks = [joblib.delayed(fitted.predict_proba)(part) for part in np.split(X, 4)]
    got = np.concatenate(joblib.Parallel(n_jobs=2)(tasks))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    threaded = joblib.Parallel(n_jobs=2, backend="threading")(tasks)
    np.testing.assert_allclose(np.concatenate(threaded), expected, rtol=1e-4, atol=1e-6)
