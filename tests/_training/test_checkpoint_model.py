"""Tests of the fitted estimator that is made from a checkpoint."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from trainer_helpers import (
    TARGETS,
    each_target,
    equal_bits,
    make_classifier,
    make_estimator,
)

from sktl import FineTunedCNNClassifier
from sktl._training.checkpoint_model import load_checkpoint
from sktl._utils.tensor_file import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

Y = np.repeat(["a", "b"], 20)[np.arange(40) * 7 % 40]  # hard to learn
load = FineTunedCNNClassifier.from_checkpoint


def interrupt(estimator, images, monkeypatch, n_epochs=2):
    """Stop a fit by Ctrl-C at the end of an epoch; return the weights of each epoch."""
    weights = []

    def save(self, trainer):
        weights.append(trainer.copy_weights())
        original(self, trainer)
        if trainer.state.epoch == n_epochs:
            raise KeyboardInterrupt

    original = load_checkpoint.__globals__["Checkpoint"].save
    with monkeypatch.context() as patch:
        patch.setattr("sktl._training.checkpoint.Checkpoint.save", save)
        with pytest.raises(KeyboardInterrupt):
            estimator.fit(images, Y)
    return weights


@pytest.mark.parametrize("alpha", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_weights_are_those_of_the_last_epoch_interpolated(
    images, tmp_path, monkeypatch, alpha
):
    estimator = make_classifier(
        "five stages",
        weights="DEFAULT",
        lr=0.01,
        wise_ft_alpha=alpha,
        checkpoint=str(tmp_path),
    )
    *_, last = interrupt(estimator, images, monkeypatch)
    options = {"max_epochs": 0, "checkpoint": None}
    probe = clone(estimator).set_params(**options).fit(images, Y).module_.state_dict()
    loaded = load(str(tmp_path))
    for name, value in loaded.module_.state_dict().items():
        expected = (1 - alpha) * probe[name].double() + alpha * last[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert (loaded.n_iter_, loaded.best_epoch_, loaded.lr_) == (2, 2, 0.01)
    assert [row["epoch"] for row in loaded.history_] == [0, 1, 2]
    assert loaded.get_params() == estimator.get_params()
    assert loaded.classes_.tolist() == ["a", "b"]
    assert loaded.predict(images).shape == (40,)


@each_target
def test_each_kind_of_target(images, tmp_path, target):
    y = TARGETS[target]
    estimator = make_estimator(target, max_epochs=1, checkpoint=str(tmp_path)).fit(
        images, y
    )
    loaded = type(estimator).from_checkpoint(tmp_path)
    np.testing.assert_array_equal(loaded.predict(images), estimator.predict(images))
    assert loaded.get_params() == estimator.get_params()
    other = make_estimator("one label" if target == "numbers" else "numbers")
    with pytest.raises(ValueError, match=f"checkpoint of {type(other).__name__}"):
        type(other).from_checkpoint(tmp_path)


def test_early_stopping_gives_the_best_epoch(images, tmp_path, monkeypatch):
    estimator = make_classifier(
        early_stopping=True, lr=0.05, max_epochs=6, checkpoint=tmp_path
    )
    weights = interrupt(estimator, images, monkeypatch, n_epochs=4)
    loaded = load(tmp_path)
    ranks = [
        (round(row["valid_score"], 6), -row["valid_loss"]) for row in loaded.history_
    ]
    assert loaded.best_epoch_ == ranks.index(max(ranks)) > 0
    assert loaded.n_iter_ == 4 == len(loaded.validation_scores_)
    for name, value in loaded.module_.state_dict().items():
        assert torch.equal(value, weights[loaded.best_epoch_ - 1][name])


def test_the_run_can_be_completed_and_continued(images, tmp_path, monkeypatch):
    estimator = make_classifier(checkpoint=tmp_path)
    expected = clone(estimator).set_params(checkpoint=None).fit(images, Y)
    interrupt(estimator, images, monkeypatch)
    content = (tmp_path / "fine_tuning.safetensors").read_bytes()
    loaded = load(tmp_path)
    assert (tmp_path / "fine_tuning.safetensors").read_bytes() == content
    more = load(tmp_path).set_params(warm_start=True, checkpoint=None)
    assert [row["epoch"] for row in more.fit(images, Y).history_] == [0, 1, 2, 3]
    loaded.fit(images, Y)  # resumes from the checkpoint
    assert equal_bits(loaded.module_, expected.module_)
    assert equal_bits(load(tmp_path).module_, expected.module_)


def test_no_completed_epoch(images, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load(tmp_path)
    estimator = make_classifier(lr="auto", checkpoint=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sktl._training.fit.build_trainer", None)
        with pytest.raises(TypeError):
            estimator.fit(images, Y)
    with pytest.raises(ValueError, match="must have a completed epoch"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": None}, "must describe its network"),
        ({"model": {"reason": "No builder."}}, "Got none: No builder."),
        ({"model": {}}, "must be a checkpoint of FineTunedCNNClassifier"),
        ({"lr": -1.0}, "must be an unchanged checkpoint.* lr and alpha"),
        ({"wise_ft_alpha": "x"}, "wise_ft_alpha"),
        ({"head_init": "x"}, "head_init 'x' is unknown"),
        ({"history": [{"epoch": 3}]}, "history must be a list of rows"),
    ],
)
def test_invalid_documents(images, tmp_path, change, reason):
    make_classifier(max_epochs=1, checkpoint=tmp_path).fit(images, Y)
    file = tmp_path / "fine_tuning.safetensors"
    tensors, document = read_tensors(file)
    write_tensors(file, tensors, {**document, **change})
    with pytest.raises(ValueError, match=reason):
        load(tmp_path)


def test_invalid_weights(images, tmp_path):
    make_classifier(max_epochs=1, checkpoint=tmp_path).fit(images, Y)
    file = tmp_path / "fine_tuning.safetensors"
    tensors, document = read_tensors(file)
    name = next(name for name in tensors if name.startswith("weights."))
    initial = {
        f"initial.{name.removeprefix('weights.')}": value
        for name, value in tensors.items()
        if name.startswith("weights.")
    }
    double = {name: value.double() for name, value in initial.items()}
    for wrong, alpha, reason in (
        ({name: torch.ones(3)}, 1, "must be an unchanged checkpoint"),
        ({"best.x": torch.ones(3)}, 1, "belong to different networks"),
        (double, 0.5, "belong to different networks"),
        (initial, 10**400, "'wise_ft_alpha' must be from 0 to 1"),
    ):
        changed = {**document, "wise_ft_alpha": alpha}
        write_tensors(file, {**tensors, **wrong}, changed)
        with pytest.raises(ValueError, match=reason):
            load(tmp_path)
