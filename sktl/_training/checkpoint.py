"""A training on disk: one file, replaced after each epoch, to go on from.

It says which run it belongs to, and is refused by any other.
"""

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sktl._images.sequence import ImageSequence
from sktl._training.targets import EncodedTargets
from sktl._training.trainer import Trainer, TrainerState
from sktl._utils.tensor_file import PARSE_ERRORS, read_tensors, write_tensors

_FORMAT = "sktl checkpoint of a fine-tuning, version 1"
_NAME = "fine_tuning"
# Parameters that do not change what comes out.
_WITHOUT_EFFECT = {"callbacks", "checkpoint", "memory", "n_jobs", "verbose", "weights"}
_WEIGHTS, _BEST, _START, _OPTIMIZER = "weights.", "best.", "start.", "optimizer."


class Checkpoint:
    """The file in a directory, and the run that it is for.

    Parameters
    ----------
    directory : str or path-like
        Made if it is not there. One run has it at a time.
    identity : mapping of str
        What a run is: data, classes, parameters, versions; anything that JSON can
        hold.

    Raises
    ------
    NotADirectoryError
        If it is a file.
    """

    def __init__(
        self, directory: str | os.PathLike[str], identity: Mapping[str, Any]
    ) -> None:
        self._file = _file_in(directory)
        folder = self._file.parent
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                "The 'checkpoint' parameter must be a directory. Got "
                f"{str(folder)!r}, which is a file."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = dict(identity)

    def resume(self, training: Trainer) -> bool:
        """Put a training where this run was.

        Parameters
        ----------
        training : Trainer
            Of the same network, not begun.

        Returns
        -------
        bool
            Whether there was anything to go on from.

        Raises
        ------
        ValueError
            If the file is damaged, or belongs to another run; says what differs.
        """
        for left in self._file.parent.glob(f"{_NAME}-*.tmp"):  # by a killed writer
            with contextlib.suppress(OSError):
                left.unlink()
        content = _read(self._file)
        if content is None:
            return False
        tensors, document = content
        self._check(document.get("identity"))
        try:
            _restore(training, tensors, document)
        except PARSE_ERRORS as error:
            raise ValueError(
                f"The checkpoint {str(self._file)!r} must fit the network and its "
                f"optimizer, and does not: {type(error).__name__}: {error}. Delete it "
                "to start anew."
            ) from error
        return True

    def save(self, training: Trainer) -> None:
        """Write where the run is; where that fails, warn, and leave what was there.

        Parameters
        ----------
        training : Trainer
            After a whole epoch.
        """
        progress = training.progress
        optimizer = training.net.optimizer_.state_dict()["state"]
        weights = training.network.state_dict()
        tensors = {f"{_WEIGHTS}{name}": value for name, value in weights.items()}
        tensors |= {f"{_BEST}{name}": v for name, v in progress.best_weights.items()}
        tensors |= {f"{_START}{name}": v for name, v in progress.start_weights.items()}
        for number, state in optimizer.items():
            for part, value in state.items():
                if value is not None:
                    name = f"{_OPTIMIZER}{number}.{part}"
                    tensors[name] = torch.as_tensor(value)
        document = {
            "format": _FORMAT,
            "identity": self._identity,
            "seed": progress.seed,
            "epoch": progress.epoch,
            "history": progress.history,
            "best_epoch": progress.best_epoch,
            "best_score": progress.best_score,
        }
        try:
            write_tensors(self._file, tensors, document)
        except OSError as error:
            warnings.warn(
                f"The checkpoint {str(self._file)!r} could not be written after epoch "
                f"{progress.epoch}: {error}. Training goes on; what was there before "
                "is still there.",
                UserWarning,
                stacklevel=2,
            )

    def _check(self, theirs: Any) -> None:
        mine = self._identity
        theirs = theirs if isinstance(theirs, dict) else {}
        other = [
            f"{name} (there {_short(theirs.get(name))}, here {_short(mine.get(name))})"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        if other:
            raise ValueError(
                f"The checkpoint {str(self._file)!r} must be of this very run. It "
                f"differs in {', '.join(other)}. Use another directory, or delete the "
                "file to start anew."
            )


def run_fingerprint(
    parameters: Mapping[str, Any],
    images: ImageSequence,
    given: EncodedTargets,
    digest: str,
) -> dict[str, Any]:
    """Say what a run is, in values that JSON can hold.

    Parameters
    ----------
    parameters : mapping of str
        Of the estimator.
    images : ImageSequence
        Those that count.
    given : EncodedTargets
        Those that count, with labels and weights.
    digest : str
        Of the weights it starts from.

    Returns
    -------
    dict of str
        Equal for two runs that would come to the same, on the same machine.
    """
    X = hashlib.sha256(b"".join(images.content_hashes()))
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in parameters.items()
        if name not in _WITHOUT_EFFECT
    }
    chosen = {
        name: value if isinstance(value, bool | int | float) else _named(value)
        for name, value in plain.items()
    }
    if not isinstance(parameters["random_state"], Integral):
        chosen["random_state"] = "none: that of the checkpoint is used"
    return {
        **chosen,
        "X": X.hexdigest(),
        "y": hashlib.sha256(given.label.tobytes()).hexdigest(),
        "weights of samples and classes": hashlib.sha256(
            given.weight.tobytes()
        ).hexdigest(),
        "classes": [str(each) for each in given.classes.tolist()],
        "digest of weights": digest,
        "torch": torch.__version__.split("+")[0],
    }


def checkpoint_seed(directory: str | os.PathLike[str], otherwise: int) -> int:
    """Give the seed of the run whose checkpoint is in a directory.

    Parameters
    ----------
    directory : str or path-like
        As `Checkpoint` has it.
    otherwise : int
        What to give if there is none.

    Returns
    -------
    int
        What a run that goes on from there has to begin with.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    content = _read(_file_in(directory))
    return otherwise if content is None else int(content[1]["seed"])


def _file_in(directory: str | os.PathLike[str]) -> Path:
    if not os.fspath(directory):
        raise ValueError(
            "The 'checkpoint' parameter must be the name of a directory. Got ''."
        )
    return Path(directory).expanduser() / f"{_NAME}.safetensors"


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    try:
        tensors, document = read_tensors(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{error} Delete it to start anew.") from error
    seed = document.get("seed")
    whole = type(seed) is int and 0 <= seed < 2**31
    if document.get("format") != _FORMAT or not whole:
        raise ValueError(
            f"The checkpoint {str(file)!r} must be of the format {_FORMAT!r}. Got "
            f"{document.get('format')!r}{'' if whole else ' without a seed'}. Use "
            "another directory."
        )
    return tensors, document


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:20]}…"


def _named(value: Any) -> str:
    """Give the text of a value, without where in the memory of a process it is."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


def _restore(
    training: Trainer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(_OPTIMIZER, tensors).items():
        number, part = name.split(".", 1)
        optimizer.setdefault(int(number), {})[part] = value
    accuracy, minus_loss = document["best_score"]
    progress = TrainerState(
        seed=int(document["seed"]),
        epoch=int(document["epoch"]),
        history=[dict(row) for row in document["history"]],
        best_epoch=int(document["best_epoch"]),
        best_score=(float(accuracy), float(minus_loss)),
        best_weights=_below(_BEST, tensors),
        start_weights=_below(_START, tensors),
    )
    training.restore(_below(_WEIGHTS, tensors), progress, optimizer)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
