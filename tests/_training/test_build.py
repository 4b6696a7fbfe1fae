"""Tests of the assembly of a training from the parameters of an estimator."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback

from sktl import FineTunedCNNClassifier
from sktl._images.validation import validate_images
from sktl._training.build import (
    TrainingData,
    build_datasets,
    build_frozen_activations,
    build_initial_model,
    build_trainer,
    initialize_head,
)
from sktl._training.config import TrainerState
from sktl._training.multiclass import encode_multiclass
from sktl._training.targets import validation_mask

pytestmark = pytest.mark.usefixtures("quick_linear_probe")


@pytest.fixture
def make_parts(images):
    """Return a function that makes an estimator and the parts of its training."""

    def make(**parameters):
        estimator = FineTunedCNNClassifier("tiny", **parameters)
        X = validate_images(images, estimator=estimator, reset=True)
        y = np.arange(40) % 2
        targets = encode_multiclass(
            len(X), y, None, class_weight=None, estimator=estimator
        )
        fraction = 0.25 if estimator.early_stopping else None
        data = TrainingData(X, targets, validation_mask(targets, fraction, 0))
        model = build_initial_model(estimator, targets.target, None, seed=0)
        activations = build_frozen_activations(estimator, model, X)
        return SimpleNamespace(
            estimator=estimator, model=model, data=data, activations=activations
        )

    return make


def make_trainer(parts, state=None, **options):
    state = TrainerState(0) if state is None else state
    return build_trainer(
        parts.estimator, parts.model, parts.data, parts.activations, state, **options
    )


@pytest.mark.parametrize(
    ("trainable", "n_trainable"), [("head", 0), (1, 1), ("all", 2)]
)
def test_trainable_stages_optimizer_and_learning_rate(
    make_parts, trainable, n_trainable
):
    trainer = make_trainer(make_parts(trainable=trainable, lr=0.5, optimizer="sgd"))
    names = [name for name, _ in trainer.network.named_children()]
    requires_grad = [
        any(p.requires_grad for p in part.parameters()) for part in trainer.network
    ]
    assert names == ["stem", "stage1", "neck", "head"]
    assert requires_grad[:2] == [False] * (2 - n_trainable) + [True] * n_trainable
    assert trainer.net.optimizer_.param_groups[0]["max_lr"] == 0.5
    assert type(trainer.net.optimizer_).__name__ == "SGD"


def test_callbacks_are_copied(make_parts):
    callback = Callback()
    trainer = make_trainer(make_parts(callbacks=[callback]))
    callbacks = [each for _, each in trainer.net.callbacks_]
    assert sum(type(each) is Callback for each in callbacks) == 1
    assert all(each is not callback for each in callbacks)


def test_single_epoch_has_a_constant_learning_rate(make_parts):
    parts = make_parts(lr=0.5, lr_schedule="cosine", max_epochs=7, wise_ft_alpha=0.4)
    state = TrainerState(0, epoch=3)
    trainer = make_trainer(parts, state, single_epoch=True)
    initialize_head(trainer, parts.model, parts.data, parts.activations)
    trainer.run()
    assert [row["epoch"] for row in trainer.state.history] == [0, 4]
    assert trainer.state.history[-1]["lr"] == 0.5
    assert trainer.state.initial_weights == {}  # no interpolation


def test_initial_model_continues_a_fitted_one(make_parts):
    parts = make_parts()
    target = parts.data.targets.target
    fitted = parts.model.to_fitted(target, 0)
    model = build_initial_model(parts.estimator, target, fitted, seed=9)
    for name, value in fitted.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)


def test_linear_probe_is_fitted_on_the_training_set_only(make_parts, monkeypatch):
    calls = []
    parts = make_parts(early_stopping=True, augmentation="flip")
    monkeypatch.setattr(
        "sktl._training.multiclass.fit_linear_probe",
        lambda head, x, y, weight, **options: calls.append((x, y, weight)),
    )
    trainer = make_trainer(parts)
    initialize_head(trainer, parts.model, parts.data, parts.activations)
    train = ~parts.data.held_out
    ((x, y, weight),) = calls
    assert len(x) == train.sum() == 30
    np.testing.assert_array_equal(x, parts.activations.features()[train])
    np.testing.assert_array_equal(y, parts.data.targets.y[train])
    assert weight.mean() == pytest.approx(1)
    assert [row["epoch"] for row in trainer.state.history] == [0]


@pytest.mark.parametrize("augmentation_views", [None, 2])
def test_validation_set_is_not_augmented(make_parts, augmentation_views):
    parts = make_parts(
        early_stopping=True,
        augmentation="standard",
        augmentation_views=augmentation_views,
    )
    train, valid = build_datasets(
        parts.estimator, parts.model, parts.data, parts.activations, seed=0
    )
    assert (len(train), len(valid)) == (30, 10)
    rows = np.flatnonzero(parts.data.held_out)
    expected = [parts.model.preprocessing(parts.data.images[row]) for row in rows]
    pixels, (y, _) = next(valid.batches(range(10), 1))
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(y, parts.data.targets.y[rows])
    epochs = [next(train.batches(range(30), 1))[0] for _ in range(2)]
    assert not torch.equal(*epochs)


def test_datasets_without_augmentation(make_parts):
    parts = make_parts(early_stopping=True)
    datasets = build_datasets(
        parts.estimator, parts.model, parts.data, parts.activations, seed=0
    )
    for dataset, mask in zip(
        datasets, (~parts.data.held_out, parts.data.held_out), strict=True
    ):
        rows = np.flatnonzero(mask)
        expected = [parts.model.preprocessing(parts.data.images[row]) for row in rows]
        pixels, (y, weight) = next(dataset.batches(range(len(rows)), 1))
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(y, parts.data.targets.y[rows])
        np.testing.assert_array_equal(weight, np.ones(len(rows)))
