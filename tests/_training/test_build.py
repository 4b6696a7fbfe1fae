"""Tests of the assembly of a training from the parameters of an estimator."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from trainer_helpers import make_parts

from sktl._training.build import (
    _BATCH_SIZES,
    _N_STEPS,
    build_config,
    build_initial_model,
    build_trainer,
    default_batch_size,
    fit_head,
    warn_of_shared_gpu,
)
from sktl._training.config import TrainerState
from sktl._training.user_callbacks import copy_callbacks

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


def make_config(parts, **options):
    names = ("lr", "head_init", "wise_ft_alpha")
    given = {name: getattr(parts.estimator, name) for name in names}
    return build_config(parts, **{**given, **options})


def make_trainer(parts, **options):
    callbacks = copy_callbacks(parts.estimator.callbacks)
    return build_trainer(parts, make_config(parts, **options), callbacks)


def initialize_head(trainer, parts):
    features, held_out = parts.activations.features(), parts.data.held_out
    fit_head(parts.model, parts.data.targets, features, ~held_out, seed=0)
    trainer.record_initial_epoch(features, parts.data.targets, held_out)


@pytest.mark.parametrize(
    ("trainable", "n_trainable"), [("head", 0), (1, 1), ("all", 2)]
)
def test_trainable_stages_optimizer_and_learning_rate(images, trainable, n_trainable):
    parts = make_parts(images, trainable=trainable, lr=0.5, optimizer="sgd")
    trainer = make_trainer(parts)
    names = [name for name, _ in trainer.network.named_children()]
    requires_grad = [
        any(p.requires_grad for p in part.parameters()) for part in trainer.network
    ]
    assert names == ["stem", "stage1", "neck", "head"]
    assert requires_grad[:2] == [False] * (2 - n_trainable) + [True] * n_trainable
    assert trainer.net.optimizer_.param_groups[0]["max_lr"] == 0.5
    assert type(trainer.net.optimizer_).__name__ == "SGD"


def test_callbacks_are_copied(images):
    callback = Callback()
    trainer = make_trainer(make_parts(images, callbacks=[callback]))
    callbacks = [each for _, each in trainer.net.callbacks_]
    assert sum(type(each) is Callback for each in callbacks) == 1
    assert all(each is not callback for each in callbacks)


def test_partial_fit_is_one_epoch_of_a_constant_learning_rate(images):
    parts = make_parts(images, lr=0.5, lr_schedule="cosine", max_epochs=7)
    parts = replace(parts, state=TrainerState(0, epoch=3), partial=True)
    trainer = make_trainer(parts, wise_ft_alpha=1.0)
    initialize_head(trainer, parts)
    trainer.run()
    assert [row["epoch"] for row in trainer.state.history] == [0, 4]
    assert trainer.state.history[-1]["lr"] == 0.5
    assert trainer.state.initial_weights == {}  # no interpolation


def test_settings_that_are_numbers_replace_those_of_the_estimator(images):
    auto = dict.fromkeys(("lr", "head_init", "wise_ft_alpha"), "auto")
    parts = make_parts(images, max_epochs=7, **auto)
    chosen = {"lr": 0.5, "head_init": "random", "wise_ft_alpha": 0.2}
    config = make_config(parts, **chosen)
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert config.max_epochs == 7


@pytest.mark.parametrize("n_images", [1, 85, 300, 1000, 10**6])
@pytest.mark.parametrize("max_epochs", [0, 1, 10, 100])
def test_default_batch_size_is_the_largest_with_enough_steps(n_images, max_epochs):
    size = default_batch_size(n_images, max_epochs)
    least, largest = _BATCH_SIZES
    sizes = range(least, largest + 1)
    enough = [each for each in sizes if n_images * max_epochs / each >= _N_STEPS]
    assert size == max(enough, default=least)


@pytest.mark.parametrize(
    ("batch_size", "partial", "expected"),
    [("auto", False, default_batch_size(30, 90)), ("auto", True, 32), (5, False, 5)],
)
def test_batch_size(images, batch_size, partial, expected):
    options = {"early_stopping": True, "batch_size": batch_size, "max_epochs": 90}
    parts = replace(make_parts(images, **options), partial=partial)
    assert make_config(parts).batch_size == expected


def test_initial_model_continues_a_fitted_one(images):
    parts = make_parts(images)
    target = parts.data.targets.target
    fitted = parts.model.to_fitted(target, 0)
    model = build_initial_model(parts.estimator, target, fitted, seed=9)
    for name, value in fitted.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)


def test_linear_probe_is_fitted_on_the_training_set_only(images, monkeypatch):
    calls = []
    parts = make_parts(images, early_stopping=True, augmentation="flip")
    monkeypatch.setattr(
        "sktl._training.multiclass.fit_linear_probe",
        lambda head, x, y, weight, **options: calls.append((x, y, weight)),
    )
    trainer = make_trainer(parts)
    initialize_head(trainer, parts)
    train = ~parts.data.held_out
    ((x, y, weight),) = calls
    assert len(x) == train.sum() == 30
    np.testing.assert_array_equal(x, parts.activations.features()[train])
    np.testing.assert_array_equal(y, parts.data.targets.y[train])
    assert weight.mean() == pytest.approx(1)
    assert [row["epoch"] for row in trainer.state.history] == [0]


@pytest.mark.parametrize("early_stopping", [False, True])
def test_validation_set_of_the_trainer(images, early_stopping):
    parts = make_parts(images, early_stopping=early_stopping, max_epochs=1)
    trainer = make_trainer(parts)
    trainer.run()
    (row,) = trainer.state.history
    assert ("valid_loss" in row) == early_stopping


def test_warning_for_workers_that_share_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    warn_of_shared_gpu(cuda)  # not a worker process
    worker = SimpleNamespace(name="LokyProcess-3")
    monkeypatch.setattr("sktl._training.build.current_process", lambda: worker)
    warn_of_shared_gpu(torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"share one GPU.*n_jobs=1"):
        warn_of_shared_gpu(cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    warn_of_shared_gpu(cuda)
