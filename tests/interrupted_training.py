"""Classifiers for tests of interrupted trainings, and a program that trains one.

``python interrupted_training.py DIRECTORY NAME EVENT NUMBER`` kills itself with SIGKILL
at the given number of an event; see `Kill`.
"""

import contextlib
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from shared_fixtures import FIXED, TinyNet
from sklearn.datasets import load_sample_images
from sklearn.model_selection import GridSearchCV
from sklearn.utils import check_random_state
from skorch.callbacks import Callback

from sktl import FineTunedCNNClassifier


class StopAt(Callback):
    """Raise KeyboardInterrupt in the first batch after `n_epochs` epochs."""

    def __init__(self, n_epochs):
        self.n_left = n_epochs

    def on_epoch_end(self, net, **rest):
        self.n_left -= 1

    def on_batch_begin(self, net, **rest):
        if self.n_left == 0:
            raise KeyboardInterrupt


def random_rotation(image):
    """Draw from the global generators of NumPy and Python."""
    n = random.randrange(2) + int(check_random_state(None).randint(3))
    return image.rotate(90 * n)


KINDS = {
    "adamw": {"dropout": 0.3, "augmentation": "flip", "early_stopping": True},
    "sgd": {"optimizer": "sgd", "augmentation": "standard", "layer_decay": 0.5},
    "stage by stage": {
        "unfreeze_every": 2,
        "augmentation": random_rotation,
        "dropout": 0.3,
    },
    "random head": {
        "head_init": "random",
        "optimizer": "sgd",
        "augmentation": "trivial",
        "early_stopping": True,
        "hidden_layer_sizes": 8,
        "lr_schedule": "onecycle",
    },
    "selection": {
        "lr": "auto",
        "head_init": "auto",
        "augmentation": random_rotation,
        "dropout": 0.3,
    },
    "no random state": {
        "random_state": None,
        "dropout": 0.5,
        "augmentation": random_rotation,
    },
}
N_EPOCHS = 6


def load_data():
    """Return forty images of 24 x 24 and labels that are hard to learn."""
    china, flower = load_sample_images().images
    X = [
        photograph[y : y + 24, x : x + 24]
        for photograph in (china, flower)
        for y in range(60, 300, 60)
        for x in range(40, 540, 100)
    ]
    return np.stack(X), np.repeat(["a", "b"], 20)[np.arange(40) * 7 % 40]


def make_classifier(directory, name, **options):
    """Return a classifier by name, with a checkpoint in the directory."""
    weights = Path(directory) / "weights.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        safetensors.torch.save_file(TinyNet().state_dict(), weights)
    defaults = {
        **FIXED,
        "max_epochs": N_EPOCHS,
        "batch_size": 8,
        "lr": 0.01,
        "random_state": 3,
        "engine": "torch",  # importing OpenVINO takes longer than the training
        "checkpoint": Path(directory) / "checkpoint",
    }
    return FineTunedCNNClassifier(
        "tiny",
        weights=weights,
        validation_fraction=0.2,
        n_iter_no_change=4,
        **{**defaults, **KINDS[name], **options},
    )


fsync = os.fsync


class Kill(Callback):
    """Kill this process.

    Parameters
    ----------
    event : {"selection", "batch", "gradient", "epoch", "write", "never"}
        When half of a checkpoint of the selection is written; at the end of a training
        or validation batch; between backward pass and step; after an epoch, before its
        checkpoint is written; or when half of the checkpoint is written.
    number : int
        Number of the event, from 1.
    """

    def __init__(self, event, number):
        self.event = event
        self.number = number

    def count(self, event):
        """Count an event, and kill this process at the last one."""
        if event == self.event:
            self.number -= 1
            if self.number == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def count_files(self, event):
        """Count written files from now on."""

        def counted(descriptor):
            size = os.fstat(descriptor).st_size
            if self.event == event and self.number == 1:
                os.ftruncate(descriptor, size // 2)
            self.count(event)
            fsync(descriptor)

        os.fsync = counted

    def on_train_begin(self, net, **rest):
        """Print that the training begins, and count its files."""
        print("training", flush=True)
        self.count_files("write")

    def on_batch_end(self, net, **rest):
        """Count a batch."""
        self.count("batch")

    def on_grad_computed(self, net, named_parameters, **rest):
        """Count a backward pass."""
        self.count("gradient")

    def on_epoch_end(self, net, **rest):
        """Count an epoch."""
        self.count("epoch")
        print("epoch", flush=True)


def run_in_a_fork(output, *arguments):
    """Run one training in a process of a fork server; print to the given pipe."""
    warnings.simplefilter("error")
    with open(output.fileno(), "w", closefd=False) as file:
        with contextlib.redirect_stdout(file):
            main(*arguments)


def main(directory, name, event, number):
    """Run one training."""
    X, y = load_data()
    kill = Kill(event, int(number))
    kill.count_files("selection")
    classifier = make_classifier(directory, name, callbacks=[kill])
    if event == "interrupt":  # train until interrupted
        classifier.set_params(max_epochs=10**6)
    estimator = classifier
    if event == "search":
        classifier.set_params(checkpoint=None, max_epochs=10**6)
        estimator = GridSearchCV(classifier, {"lr": [0.1, 0.2]}, cv=2, error_score=0.0)
    try:
        estimator.fit(X, y)
    except KeyboardInterrupt:
        print("interrupted", hasattr(estimator, "classes_"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
