"""A training on disk: one file, replaced after each epoch, to go on from.

It says which run it belongs to, and is refused by any other.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sktl._images import Pictures
from sktl._labels import Labelled
from sktl._tensor_file import read_tensors, write_tensors
from sktl._training import Progress, Training

_NAME = "fine_tuning"
# Parameters that do not change what comes out.
_WITHOUT_EFFECT = {"callbacks", "checkpoint", "memory", "n_jobs", "verbose", "weights"}
_WEIGHTS, _BEST, _OPTIMIZER = "weights.", "best.", "optimizer."


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
        folder = Path(directory).expanduser()
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                "The 'checkpoint' parameter must be a directory. Got "
                f"{str(folder)!r}, which is a file."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{_NAME}.safetensors"
        self._identity = dict(identity)

    def resume(self, training: Training) -> bool:
        """Put a training where this run was.

        Parameters
        ----------
        training : Training
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
        try:
            tensors, document = read_tensors(self._file)
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise ValueError(f"{error} Delete it to start anew.") from error
        self._check(document["identity"])
        optimizer: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(_OPTIMIZER, tensors).items():
            number, part = name.split(".", 1)
            optimizer.setdefault(int(number), {})[part] = value
        progress = Progress(
            seed=document["seed"],
            epoch=document["epoch"],
            history=document["history"],
            best_epoch=document["best_epoch"],
            best_score=tuple(document["best_score"]),
            best_weights=_below(_BEST, tensors),
        )
        training.restore(_below(_WEIGHTS, tensors), progress, optimizer)
        return True

    def save(self, training: Training) -> None:
        """Write where the run is; where that fails, warn, and leave what was there.

        Parameters
        ----------
        training : Training
            After a whole epoch.
        """
        progress = training.progress
        optimizer = training.net.optimizer_.state_dict()["state"]
        weights = training.network.state_dict()
        tensors = {f"{_WEIGHTS}{name}": value for name, value in weights.items()}
        tensors |= {f"{_BEST}{name}": v for name, v in progress.best_weights.items()}
        for number, state in optimizer.items():
            for part, value in state.items():
                if value is not None:
                    name = f"{_OPTIMIZER}{number}.{part}"
                    tensors[name] = torch.as_tensor(value)
        document = {
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

    def _check(self, theirs: Mapping[str, Any]) -> None:
        mine = self._identity
        other = [
            f"{name} (there {theirs.get(name)!r}, here {mine.get(name)!r})"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        if other:
            raise ValueError(
                f"The checkpoint {str(self._file)!r} must be of this very run. It "
                f"differs in {', '.join(other)}. Use another directory, or delete the "
                "file to start anew."
            )


def identity_of(
    parameters: Mapping[str, Any], pictures: Pictures, given: Labelled, digest: str
) -> dict[str, Any]:
    """Say what a run is, in values that JSON can hold.

    Parameters
    ----------
    parameters : mapping of str
        Of the estimator.
    pictures : Pictures
        All of them.
    given : Labelled
        Those that count, with labels and weights.
    digest : str
        Of the weights it starts from.

    Returns
    -------
    dict of str
        Equal for two runs that would come to the same, on the same machine.
    """
    data = hashlib.sha256(given.label.tobytes() + given.weight.tobytes())
    for row in given.rows.tolist():
        data.update(pictures.key(row))
    chosen = {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in parameters.items()
        if name not in _WITHOUT_EFFECT
    }
    if not isinstance(parameters["random_state"], Integral):
        chosen["random_state"] = "none: that of the checkpoint is used"
    return {
        **chosen,
        "data": data.hexdigest(),
        "classes": [str(each) for each in given.classes.tolist()],
        "digest of weights": digest,
        "torch": torch.__version__.split("+")[0],
    }


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
