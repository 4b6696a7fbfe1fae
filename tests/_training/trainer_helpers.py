"""Datasets and trainers of a small network, and comparisons of weights."""

from dataclasses import replace

import numpy as np
import torch

from sktl import FineTunedCNNClassifier
from sktl._backbones.registry import load_backbone
from sktl._images.augmentation import augmentation_for
from sktl._images.validation import validate_images
from sktl._training.config import TrainerState, TrainingConfig
from sktl._training.datasets import ImageDataset
from sktl._training.multiclass import MulticlassTarget
from sktl._training.network import replace_head
from sktl._training.trainer import Trainer
from sktl._utils.random_state import temporary_seed

BACKBONE = load_backbone("tiny", None, random_state=0)
TARGET = MulticlassTarget(np.array([0, 1]))
Y = np.repeat([0, 1], 20)
SAMPLE_WEIGHT = np.linspace(0.5, 1.5, 40)
CONFIG = TrainingConfig(
    n_trainable_stages=2,
    freeze_batch_norm=False,
    optimizer="adamw",
    lr=0.01,
    layer_decay=0.5,
    weight_decay=0.1,
    lr_schedule="cosine",
    max_epochs=3,
    label_smoothing=0.1,
    wise_ft_alpha=1.0,
    unfreeze_every=None,
    patience=None,
    batch_size=16,
    device=torch.device("cpu"),
    precision="float32",
    verbose=0,
)


def make_classifier(backbone="tiny", **parameters):
    """Return a classifier that trains three short epochs."""
    defaults = {"weights": None, "max_epochs": 3, "batch_size": 16, "random_state": 0}
    return FineTunedCNNClassifier(backbone, **{**defaults, **parameters})


def make_dataset(images, rows=slice(None), augmentation=None):
    """Return the dataset of some rows of the forty images."""
    rows = np.arange(len(images))[rows]
    return ImageDataset(
        validate_images(images, estimator=make_classifier(), reset=True),
        rows,
        Y[rows],
        SAMPLE_WEIGHT[rows],
        augmentation=augmentation_for(augmentation, BACKBONE.preprocessing),
        image_size=16,
        n_jobs=None,
    )


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
