"""Checkpoint of a training: one file, replaced after each epoch, to resume from.

It contains the fingerprint of its run and is refused by any other run.
"""

import contextlib
import errno
import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sktl._images.sequence import ImageSequence
from sktl._training.config import (
    SelectionRow,
    TrainerState,
    order_columns,
    parse_selection,
)
from sktl._training.targets import EncodedTargets
from sktl._training.trainer import Trainer
from sktl._utils.json_values import get_value, require
from sktl._utils.tensor_file import read_tensors, write_tensors

_FORMAT = "sktl training checkpoint, version 4"
_NAME = "fine_tuning"
# Parameters that do not change the result.
_IGNORED = {
    "callbacks",
    "checkpoint",
    "extra_formats",
    "max_image_pixels",
    "memory",
    "n_jobs",
    "verbose",
    "weights",
}
_SELECTION, _TRAINING = "selection", "training"  # phases of a run
_WEIGHTS, _BEST, _INITIAL, _OPTIMIZER = "weights.", "best.", "initial.", "optimizer."


class Checkpoint:
    """The checkpoint file of one run. It is read once, when this object is made.

    Parameters
    ----------
    directory : str or path-like
        Directory of the file. One run at a time may use it.

    Raises
    ------
    NotADirectoryError
        If the directory is a file.
    ValueError
        If the checkpoint file is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if not os.fspath(directory):
            raise ValueError(
                "The 'checkpoint' parameter must be the name of a directory. Got ''."
            )
        folder = Path(directory).expanduser()
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                "The 'checkpoint' parameter must be a directory. Got "
                f"{str(folder)!r}, which is a file."
            )
        self._file = folder / f"{_NAME}.safetensors"
        self._tensors, self._document = _read(self._file)
        self._fingerprint: dict[str, Any] = {}
        self._model: dict[str, Any] = {}

    def seed(self, default: int) -> int:
        """Return the seed of the run in the file; `default` if there is no file."""
        return int(self._document.get("seed", default))

    def open(
        self, fingerprint: Mapping[str, Any], model: Mapping[str, Any]
    ) -> list[SelectionRow]:
        """Create the directory if needed, and make sure that the file is of this run.

        Parameters
        ----------
        fingerprint : mapping of str
            From `run_fingerprint`.
        model : mapping of str
            From `describe_model`, so that the estimator can be made from the file.

        Returns
        -------
        list of SelectionRow
            The rows of the selection of this run, as far as it came.

        Raises
        ------
        ValueError
            If the file belongs to another run: names the differences.
        """
        self._fingerprint, self._model = dict(fingerprint), dict(model)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for partial in self._file.parent.glob(f"{_NAME}-*.tmp"):  # of a killed process
            with contextlib.suppress(OSError):
                partial.unlink()
        if not self._document:
            return []
        self._check_fingerprint(self._document.get("fingerprint"))
        try:
            return parse_selection(self._document.get("selection"))
        except ValueError as error:
            raise self._unfit(error) from error

    def resume(self, trainer: Trainer) -> bool:
        """Load the state of this run into a trainer, and forget it.

        Parameters
        ----------
        trainer : Trainer
            Trainer of the same network, not run yet.

        Returns
        -------
        bool
            Whether the file has the state of a training.

        Raises
        ------
        ValueError
            If the state does not fit the network or its optimizer.
        """
        tensors, document = self._tensors, self._document
        self._tensors, self._document = {}, {}  # up to four times the network
        if not document or document.get("phase") == _SELECTION:
            return False
        try:
            trainer.load_state(
                _with_prefix(_WEIGHTS, tensors),
                _parse_state(document, tensors),
                _parse_optimizer(tensors),
            )
        except ValueError as error:
            raise self._unfit(error) from error
        return True

    def last_epoch(
        self,
    ) -> tuple[TrainerState, dict[str, Tensor], dict[str, Any]] | None:
        """Return what a fitted model is made of; None before the first epoch.

        Returns
        -------
        state : TrainerState
            State after the last completed epoch.
        weights : dict of str to Tensor
            The state dict of the network, if the training had ended there.
        document : dict of str
            The document of the file; anything may be in it.

        Raises
        ------
        FileNotFoundError
            If there is no file.
        ValueError
            If the state is invalid.
        """
        document = self._document
        if not document:
            raise FileNotFoundError(
                errno.ENOENT, "There is no checkpoint", str(self._file)
            )
        if document.get("phase") == _SELECTION:
            return None
        try:
            state = _parse_state(document, self._tensors)
            weights = _with_prefix(_WEIGHTS, self._tensors)
            alpha = get_value(document, "wise_ft_alpha", (int, float))
            require(0 <= alpha <= 1, "its 'wise_ft_alpha' must be from 0 to 1")
            expected = {n: (v.shape, v.dtype) for n, v in weights.items()}
            for others in (state.best_weights, state.initial_weights):
                found = {n: (v.shape, v.dtype) for n, v in others.items()}
                if others and found != expected:
                    raise ValueError("its weights belong to different networks")
        except ValueError as error:
            raise self._unfit(error) from error
        return state, dict(state.final_weights(weights, alpha)), document

    def save_selection(self, state: TrainerState) -> None:
        """Write the rows of the selection; warn if that fails.

        Parameters
        ----------
        state : TrainerState
            State before the training.
        """
        rows = [asdict(row) for row in state.selection]
        document = {"phase": _SELECTION, "seed": state.seed, "selection": rows}
        self._write({}, document, "in the selection of lr and wise_ft_alpha")

    def save(self, trainer: Trainer) -> None:
        """Write the state of the run; warn and keep the previous file if that fails.

        Parameters
        ----------
        trainer : Trainer
            After a completed epoch.
        """
        state = trainer.state
        groups = {
            _WEIGHTS: trainer.network.state_dict(),
            _BEST: state.best_weights,
            _INITIAL: state.initial_weights,
        }
        tensors = {
            f"{prefix}{name}": value
            for prefix, weights in groups.items()
            for name, value in weights.items()
        }
        optimizer = trainer.net.optimizer_.state_dict()["state"]
        for number, values in optimizer.items():
            for key, value in values.items():
                if value is not None:
                    name = f"{_OPTIMIZER}{number}.{key}"
                    tensors[name] = torch.as_tensor(value)
        document = {
            "phase": _TRAINING,
            "seed": state.seed,
            "epoch": state.epoch,
            "history": state.history,
            "best_epoch": state.best_epoch,
            "best_score": state.best_score,
            "selection": [asdict(row) for row in state.selection],
            "lr": trainer.config.lr,
            "head_init": trainer.config.head_init,
            "wise_ft_alpha": trainer.config.wise_ft_alpha,
            "model": self._model,
        }
        self._write(tensors, document, f"after epoch {state.epoch}")

    def _write(
        self, tensors: dict[str, Tensor], document: dict[str, Any], when: str
    ) -> None:
        identity = {"format": _FORMAT, "fingerprint": self._fingerprint}
        try:
            write_tensors(self._file, tensors, {**identity, **document})
        except OSError as error:
            warnings.warn(
                f"The checkpoint {str(self._file)!r} could not be written {when}: "
                f"{error}. Training continues; the previous checkpoint is still there.",
                UserWarning,
                stacklevel=3,
            )

    def _unfit(self, error: ValueError) -> ValueError:
        return ValueError(
            f"The checkpoint {str(self._file)!r} must fit the network and its "
            f"optimizer, and does not: {error}. Delete it to start again."
        )

    def _check_fingerprint(self, found: Any) -> None:
        expected = self._fingerprint
        found = found if isinstance(found, dict) else {}
        differences = [
            f"{name} (in the file {_abbreviate(found.get(name))}, now "
            f"{_abbreviate(expected.get(name))})"
            for name in sorted({*expected, *found})
            if expected.get(name) != found.get(name)
        ]
        if differences:
            more = ""
            if expected.get("max_epochs") != found.get("max_epochs"):
                more = (
                    " To train for more epochs, load the estimator of the file with "
                    "from_checkpoint, and fit it with warm_start=True, a larger "
                    "max_epochs and another checkpoint directory."
                )
            raise ValueError(
                f"The checkpoint {str(self._file)!r} must belong to this run. It "
                f"differs in {', '.join(differences)}. Use another directory, or "
                f"delete the file to start again.{more}"
            )


def run_fingerprint(
    parameters: Mapping[str, Any],
    images: ImageSequence,
    targets: EncodedTargets,
    digest: str,
) -> dict[str, Any]:
    """Return what identifies a run, as values that JSON can hold.

    Parameters
    ----------
    parameters : mapping of str
        Parameters of the estimator.
    images : ImageSequence
        Images whose weight is positive.
    targets : EncodedTargets
        Their targets and weights.
    digest : str
        Digest of the initial weights.

    Returns
    -------
    dict of str
        Equal for two runs with the same result on the same machine.
    """
    X = hashlib.sha256(b"".join(images.content_hashes()))
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in parameters.items()
        if name not in _IGNORED
    }
    fingerprint = {
        name: value if isinstance(value, bool | int | float) else _stable_repr(value)
        for name, value in plain.items()
    }
    if not isinstance(parameters["random_state"], Integral):
        fingerprint["random_state"] = "none: that of the checkpoint is used"
    if targets.validation is not None:
        fingerprint["X_val"] = f"{targets.validation.sum()} images"
    if targets.groups is not None:
        fingerprint["groups"] = hashlib.sha256(targets.groups.tobytes()).hexdigest()
    return {
        **fingerprint,
        "X": X.hexdigest(),
        "y": hashlib.sha256(targets.y.tobytes()).hexdigest(),
        "sample weights": hashlib.sha256(targets.sample_weight.tobytes()).hexdigest(),
        **targets.target.fingerprint(),
        "initial weights": digest,
        "torch": torch.__version__.split("+")[0],
    }


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and document of a checkpoint file; both are empty without one."""
    try:
        tensors, document = read_tensors(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except ValueError as error:
        raise ValueError(f"{error} Delete it to start again.") from error
    seed = document.get("seed")
    has_seed = type(seed) is int and 0 <= seed < 2**31
    if document.get("format") != _FORMAT or not has_seed:
        raise ValueError(
            f"The checkpoint {str(file)!r} must have the format {_FORMAT!r}. Got "
            f"{document.get('format')!r}{'' if has_seed else ' without a seed'}. Use "
            "another directory."
        )
    return tensors, document


def _parse_state(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> TrainerState:
    """Return the state in a document; raise a ValueError if a value is invalid."""
    epochs = [document.get("epoch"), document.get("best_epoch")]
    score, history = document.get("best_score"), document.get("history")
    if not all(type(epoch) is int for epoch in epochs):
        raise ValueError("its epochs must be ints")
    if not (
        isinstance(score, list)
        and [type(value) in (int, float) for value in score] == [True, True]
        and all(type(value) is float or abs(value) < 2**53 for value in score)
    ):
        raise ValueError("its best score must be two numbers")
    if not (
        isinstance(history, list) and all(isinstance(row, dict) for row in history)
    ):
        raise ValueError("its history must be a list of dicts")
    return TrainerState(
        seed=int(document["seed"]),
        epoch=int(document["epoch"]),
        history=[order_columns(row) for row in history],
        best_epoch=int(document["best_epoch"]),
        best_score=(float(score[0]), float(score[1])),
        best_weights=_with_prefix(_BEST, tensors),
        initial_weights=_with_prefix(_INITIAL, tensors),
        selection=parse_selection(document.get("selection")),
    )


def _parse_optimizer(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _with_prefix(_OPTIMIZER, tensors).items():
        number, _, key = name.partition(".")
        if not re.fullmatch(r"\d{1,9}", number, re.ASCII):
            raise ValueError(f"its optimizer has a tensor {name!r}")
        state.setdefault(int(number), {})[key] = value
    return state


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:20]}…"


def _stable_repr(value: Any) -> str:
    """Return the text of a value without memory addresses."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))
