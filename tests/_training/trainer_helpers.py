"""Datasets and trainers of a small network, and comparisons of weights."""

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared_fixtures import FIXED
from sklearn.metrics import r2_score
from sklearn.utils import check_random_state

from sktl import FineTunedCNNClassifier, FineTunedCNNRegressor
from sktl._backbones.new_head import replace_head
from sktl._backbones.registry import load_backbone
from sktl._images.augmentation import augmentation_for
from sktl._images.sequence import ImageSequence
from sktl._images.validation import validate_images
from sktl._training.build import prepare_fit
from sktl._training.config import TrainerState, TrainingConfig
from sktl._training.datasets import ImageDataset
from sktl._training.decoded_images import DecodedImages
from sktl._training.multiclass import MulticlassTarget, encode_multiclass
from sktl._training.trainer import Trainer
from sktl._utils.random_state import temporary_seed

BACKBONE = load_backbone("tiny", None, random_state=0)
TARGET = MulticlassTarget(np.array([0, 1]), label_smoothing=0.1)
Y = np.repeat([0, 1], 20)
SEED = int(check_random_state(0).randint(2**31 - 1))  # of random_state=0
SAMPLE_WEIGHT = np.linspace(0.5, 1.5, 40)
CONFIG = TrainingConfig(
    n_trainable_stages=2,
    head_init="linear_probe",
    freeze_batch_norm=False,
    optimizer="adamw",
    lr=0.01,
    layer_decay=0.5,
    weight_decay=0.1,
    lr_schedule="cosine",
    max_epochs=3,
    wise_ft_alpha=1.0,
    unfreeze_every=None,
    patience=None,
    scoring=None,
    batch_size=16,
    evaluation_batch_size=16,
    device=torch.device("cpu"),
    precision="float32",
    verbose=0,
)


# Targets of the forty images, for the estimators of `make_estimator`.
TARGETS = {
    "one label": np.where(np.arange(40) % 7 == 3, 1 - Y, Y),
    "several labels": np.stack([Y, np.arange(40) % 3 == 0], axis=1).astype(int),
    "numbers": 1000 + 3 * np.random.default_rng(0).normal(size=(40, 2)),
}
each_target = pytest.mark.parametrize("target", TARGETS)


def default_score(y, predicted, sample_weight=None):
    """Return the score of early stopping: accuracy of labels, or R² of numbers."""
    if y.dtype.kind == "f":
        return r2_score(y, predicted, sample_weight=sample_weight)
    right = (y == predicted).reshape(len(y), -1).mean(axis=1)
    return np.average(right, weights=sample_weight)


def make_classifier(backbone="tiny", **parameters):
    """Return a classifier that trains three short epochs."""
    return make_estimator("one label", backbone, **parameters)


def make_estimator(target, backbone="tiny", **parameters):
    """Return an estimator for a kind of target that trains three short epochs."""
    defaults = {**FIXED, "weights": None, "max_epochs": 3, "batch_size": 16}
    defaults |= {"engine": "torch"}  # OpenVINO would convert the network of each fit
    kind = FineTunedCNNRegressor if target == "numbers" else FineTunedCNNClassifier
    return kind(backbone, **{**defaults, "random_state": 0, **parameters})


class CountingSequence(ImageSequence):
    """Count how often each row is decoded."""

    def __init__(self, rows):
        super().__init__(rows, "auto")
        self.counts = Counter()
        self.lock = threading.Lock()

    def __getitem__(self, row):
        """Decode an image and count it."""
        with self.lock:
            self.counts[int(row)] += 1
        return super().__getitem__(row)


def make_parts(images, y=None, sample_weight=None, **parameters):
    """Return the parts of the fit of an estimator of pretrained weights."""
    defaults = {"weights": "DEFAULT", "validation_fraction": 0.25}
    estimator = make_classifier(**{**defaults, **parameters})
    X = validate_images(images, estimator=estimator, reset=True)
    y = np.arange(len(X)) % 2 if y is None else y
    targets = encode_multiclass(
        len(X), y, sample_weight, class_weight=None, estimator=estimator
    )
    return prepare_fit(estimator, X, targets, None, partial=False)


def make_dataset(images, rows=slice(None), augmentation=None):
    """Return the dataset of some rows of the forty images."""
    rows = np.arange(len(images))[rows]
    decoded = DecodedImages(
        validate_images(images, estimator=make_classifier(), reset=True),
        augmentation_for(augmentation, BACKBONE.preprocessing),
        image_size=16,
    )
    return ImageDataset(decoded, rows, Y[rows], SAMPLE_WEIGHT[rows], n_jobs=None)


def make_trainer(train, valid=None, **settings):
    """Return a trainer of the small network with dropout."""
    with temporary_seed(torch.device("cpu"), 0):
        network = replace_head(BACKBONE, 2, dropout=0.2)
    return Trainer(
        network,
        BACKBONE.preprocessing,
        TARGET,
        train,
        valid,
        config=replace(CONFIG, **settings),
        state=TrainerState(seed=7),
    )


def equal_bits(one, other):
    """Return whether two networks have the same weights, bit for bit."""
    weights = other.state_dict()
    return all(torch.equal(v, weights[name]) for name, v in one.state_dict().items())
