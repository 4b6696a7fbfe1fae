"""Parameters and data make the training that they say."""

import numpy as np
import pytest
from skorch.callbacks import Callback

from sktl import FineTunedCNNClassifier
from sktl._images.validation import validate_images
from sktl._training.build import (
    build_frozen_activations,
    build_initial_model,
    build_trainer,
    initialize_head,
)
from sktl._training.targets import encode_targets, validation_mask
from sktl._training.trainer import TrainerState


@pytest.fixture
def parts(images):
    """Give a function that makes an estimator and all that its training is made of."""

    def make(**parameters):
        mine = FineTunedCNNClassifier("tiny", **parameters)
        X = validate_images(images, estimator=mine, reset=True)
        y = np.arange(40) % 2
        given = encode_targets(X, y, None, class_weight=None, estimator=mine)
        held_out = validation_mask(given, 0.25 if mine.early_stopping else None, 0)
        start = build_initial_model(mine, 2, seed=0)
        activations = build_frozen_activations(
            mine, start.network, X, start.preprocessing, start.pretrained
        )
        return mine, start, X, activations, given, held_out, TrainerState(0)

    return make


@pytest.mark.parametrize(
    ("trainable", "n_trainable"), [("head", 0), (1, 1), ("all", 2)]
)
def test_depth_and_rate_are_those_asked_for(parts, trainable, n_trainable):
    training = build_trainer(*parts(trainable=trainable, lr=0.5, optimizer="sgd"))
    names = [name for name, _ in training.network.named_children()]
    trains = [
        any(p.requires_grad for p in part.parameters()) for part in training.network
    ]
    assert names == ["stem", "stage1", "neck", "head"]
    assert trains[:2] == [False] * (2 - n_trainable) + [True] * n_trainable
    assert training.net.optimizer_.param_groups[0]["highest_lr"] == 0.5
    assert type(training.net.optimizer_).__name__ == "SGD"


def test_callbacks_are_copied_and_settings_can_be_others(parts):
    callback = Callback()
    training = build_trainer(*parts(callbacks=[callback]), lr=0.25)
    assert training.net.lr == 0.25
    kinds = [type(each) for _, each in training.net.callbacks_]
    assert Callback in kinds
    assert all(each is not callback for _, each in training.net.callbacks_)


def test_what_is_held_out_is_neither_varied_nor_solved_on(parts, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sktl._training.build.fit_linear_probe",
        lambda head, x, *rest, **options: seen.append(x),
    )
    made = parts(early_stopping=True, augmentation="flip")
    _, start, _, activations, given, held_out, _ = made
    training = build_trainer(*made)
    initialize_head(training, start, activations, given, held_out)
    assert len(seen[0]) == (~held_out).sum() == 30
    assert training.progress.history[0]["epoch"] == 0
    _, watched = training.net.get_split_datasets(range(3))
    first, again = (next(watched.batches(range(10), 1))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
