"""Fuzzing of saved classifiers and checkpoints, for `fuzz.py`."""

import contextlib
import json
import os
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from mutations import damage_bytes, damage_header, damage_text, refused

sys.path.insert(0, str(Path(__file__).parents[1]))

from interrupted_training import load_data, make_classifier

from sktl import FineTunedCNNClassifier
from sktl._training import linear_probe
from sktl._training.checkpoint import Checkpoint
from sktl._utils.tensor_file import _digest


def probe_quickly():
    """Try few values of the regularization in this process, to save time."""
    linear_probe.C_GRID, linear_probe._N_FOLDS = np.array([0.01, 1.0]), 2


def damage_with_valid_sha256(rng, content):
    """Damage a file written by `write_tensors`, and update its sha256."""
    tensors = safetensors.torch.load(content)
    (length,) = struct.unpack("<Q", content[:8])
    text = json.loads(content[8 : 8 + length])["__metadata__"]["sktl"]
    if rng.random() < 0.6:
        text = damage_text(rng, text)
    else:
        _damage_tensors(rng, tensors)
    text = text.encode("utf-8", "replace").decode()
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    metadata = {"sktl": text, "sktl_sha256": _digest(tensors, text)}
    return safetensors.torch.save(tensors, metadata)


def _damage_tensors(rng, tensors):
    for _ in range(rng.choice([1, 1, 3])):
        name = rng.choice(sorted(tensors))
        value = tensors.pop(name)
        kind = rng.randrange(7)
        if kind == 0:
            value = value[..., None]
        elif kind == 1:
            value = torch.cat([value.reshape(-1)] * 2)
        elif kind == 2:
            value = value.to(rng.choice([torch.int8, torch.float64, torch.bool]))
        elif kind == 3:
            strange = torch.tensor(rng.choice([0, 1e30, float("nan")]))
            value = strange.expand(value.shape).to(value.dtype)
        elif kind == 4:
            value = value.reshape(-1)[:0]
        elif kind == 5:
            name = rng.choice([f"{name}0", "optimizer.x.y", "optimizer.99.step", ""])
        if kind < 6:
            tensors[name] = value.clone()
        if not tensors:
            return


def damage(rng, content, others):
    """Damage such a file; return whether its sha256 is still valid."""
    kind = rng.random()
    if kind < 0.4:
        return damage_bytes(rng, content, others), False
    if kind < 0.5:
        return damage_header(rng, content), False
    return damage_with_valid_sha256(rng, content), True


class Models:
    """Files written by ``FineTunedCNNClassifier.save``."""

    def __init__(self, folder):
        probe_quickly()
        os.fsync = lambda descriptor: None
        self.path = folder / "input" / "estimator.safetensors"
        X, y = load_data()
        self.X = X[:3]
        self.contents = []
        for name in ("adamw", "random head"):
            estimator = make_classifier(folder, name, max_epochs=1, checkpoint=None)
            estimator.fit(X, y).save(folder / "estimator")
            self.contents.append((folder / "estimator").read_bytes())
        self.expected = []
        for content in self.contents:
            (folder / "estimator").write_bytes(content)
            loaded = FineTunedCNNClassifier.load(folder / "estimator")
            self.expected.append(loaded.predict_proba(self.X))

    def case(self, rng):
        """Damage one file, load it, and predict."""
        number = rng.randrange(2)
        content, valid_sha256 = damage(rng, self.contents[number], self.contents)
        self.path.write_bytes(content)
        suffix = " (valid sha256)" if valid_sha256 else ""
        try:
            loaded = FineTunedCNNClassifier.load(self.path)
        except ValueError as error:
            return refused(error, self.path) + suffix
        try:
            probabilities = loaded.predict_proba(self.X)
        except ValueError:
            assert valid_sha256
            return f"loaded, predict raises ValueError{suffix}"
        if not valid_sha256:
            whole = content in self.contents
            expected = self.expected[self.contents.index(content) if whole else number]
            np.testing.assert_array_equal(probabilities, expected, strict=True)
        assert probabilities.shape == (len(self.X), len(loaded.classes_))
        return f"loaded{suffix}"


class Checkpoints:
    """Checkpoints from which a fit resumes."""

    def __init__(self, folder):
        probe_quickly()
        os.fsync = lambda descriptor: None
        self.X, self.y = load_data()
        self.X, self.y = self.X[::2], self.y[::2]
        self.folder = folder / "input"
        self.runs = []
        opened = Checkpoint.open
        for name in ("adamw", "sgd"):
            estimator = make_classifier(
                folder, name, max_epochs=3, checkpoint=self.folder
            )
            file = self.folder / "fine_tuning.safetensors"
            expected = estimator.fit(self.X, self.y).predict_proba(self.X)
            file.unlink()
            content = self._interrupted(estimator, file)
            file.unlink()
            captured = {}

            def capture_run(checkpoint, fingerprint, model, captured=captured):
                captured["run"] = fingerprint, model
                return opened(checkpoint, fingerprint, model)

            def capture_trainer(checkpoint, trainer, captured=captured):
                captured["trainer"] = trainer
                return True

            with (
                mock.patch.object(Checkpoint, "open", capture_run),
                mock.patch.object(Checkpoint, "resume", capture_trainer),
            ):
                estimator.fit(self.X, self.y)
            file.unlink()
            self.runs.append((estimator, content, expected, captured))
        self.file = file

    def _interrupted(self, estimator, file):
        """Return the checkpoint after two epochs."""
        contents = []
        save = Checkpoint.save

        def record(checkpoint, trainer):
            save(checkpoint, trainer)
            contents.append(file.read_bytes())

        with mock.patch.object(Checkpoint, "save", record):
            estimator.fit(self.X, self.y)
        return contents[1]

    def case(self, rng):
        """Damage one checkpoint, read it as an estimator, and in a fit.

        Fit if it can be read.
        """
        estimator, content, expected, captured = rng.choice(self.runs)
        contents = [each[1] for each in self.runs]
        changed, valid_sha256 = damage(rng, content, contents)
        self.file.write_bytes(changed)
        suffix = " (valid sha256)" if valid_sha256 else ""
        with contextlib.suppress(ValueError):
            FineTunedCNNClassifier.from_checkpoint(self.folder).predict(self.X[:2])
        try:
            checkpoint = Checkpoint(self.folder)
            checkpoint.open(*captured["run"])
            checkpoint.resume(captured["trainer"])
        except ValueError as error:
            return refused(error, self.file) + suffix
        try:
            estimator.fit(self.X, self.y)
        except ValueError:
            assert valid_sha256
            return f"read, refused by fit: ValueError{suffix}"
        if not valid_sha256:
            got = estimator.predict_proba(self.X)
            np.testing.assert_array_equal(got, expected, strict=True)
        return f"resumed{suffix}"
