"""Settings of a training, and its state between epochs."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from sktl._training.network import interpolate_weights

MAX_NUMBER = 2.0**1023  # a larger int in a file has no float
LINEAR_PROBE, SOFT_PROBE, RANDOM = "linear_probe", "soft_linear_probe", "random"
HEAD_INITS = (LINEAR_PROBE, SOFT_PROBE, RANDOM)  # parameter head_init


# Of the rows of a history, in this order.
HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "valid_loss",
    "valid_score",
    "lr",
    "n_trainable_stages",
)
VALID_COLUMNS = ("valid_loss", "valid_score")  # of epochs with a validation set


@dataclass(frozen=True)
class SelectionRow:
    """Settings that were tried before a training, and the result.

    Attributes
    ----------
    lr, head_init, wise_ft_alpha
        As in `FineTunedCNNClassifier`. The row of the linear probe, which is not
        trained, has a learning rate and a coefficient of 0.
    n_epochs : int
        Number of epochs that they were tried for.
    valid_loss, valid_score : float
        Mean loss (of a classifier at the best temperature) and score on the held-out
        images.
    valid_losses : tuple of float
        Loss of each held-out image, times its weight.
    """

    lr: float
    head_init: str
    wise_ft_alpha: float
    n_epochs: int
    valid_loss: float
    valid_score: float
    valid_losses: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `selection_` has: all but the losses of single images."""
        return {k: v for k, v in asdict(self).items() if k != "valid_losses"}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training, named as the parameters of the estimator.

    Attributes
    ----------
    n_trainable_stages : int
        Number of stages, counted from the head, that are trained with the head.
    head_init : str
        How the head is initialized: one of `HEAD_INITS`.
    freeze_batch_norm : bool
        Whether BatchNorm layers of trainable stages keep their pretrained statistics.
    patience : int or None
        Epochs without improvement after which training stops. None: no early stopping.
    batch_size, evaluation_batch_size : int
        Number of images per batch in training, and where nothing is trained.
    device : torch.device
        Device of the network.
    precision : str
        Precision of the computation; the weights stay float32.
    optimizer, lr, layer_decay, weight_decay, lr_schedule, max_epochs, wise_ft_alpha, \
unfreeze_every, scoring, verbose
        As in `FineTunedCNNClassifier`.
    """

    n_trainable_stages: int
    head_init: str
    freeze_batch_norm: bool
    optimizer: str
    lr: float
    layer_decay: float
    weight_decay: float
    lr_schedule: str
    max_epochs: int
    wise_ft_alpha: float
    unfreeze_every: int | None
    patience: int | None
    scoring: Any
    batch_size: int
    evaluation_batch_size: int
    device: torch.device
    precision: str
    verbose: int

    def n_trainable_in(self, epoch: int) -> int:
        """Return the number of stages that are trainable in an epoch, from 0."""
        if self.unfreeze_every is None:
            return self.n_trainable_stages
        return min(self.n_trainable_stages, int(epoch // self.unfreeze_every))


@dataclass
class TrainerState:
    """State of a training between two epochs, apart from weights and optimizer.

    Attributes
    ----------
    seed : int
        Seed of the training. Every random number of an epoch is derived from the seed
        and the number of the epoch, so that a resumed training draws the same numbers.
    epoch : int
        Number of completed epochs.
    history : list of dict
        One row per epoch. The first row may be epoch 0, the state before training.
    best_epoch : int
        Best epoch so far; without early stopping the last one.
    best_score : tuple of two floats
        Validation score and negative validation loss of the best epoch.
    best_weights : dict of str to Tensor
        State dict of the best epoch. Empty without early stopping.
    initial_weights : dict of str to Tensor
        State dict of epoch 0, to be interpolated with the last one. Empty if the
        weights are not interpolated.
    selection : list of SelectionRow
        Settings that were tried before the training.
    """

    seed: int
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    initial_weights: dict[str, Tensor] = field(default_factory=dict)
    selection: list[SelectionRow] = field(default_factory=list)

    def final_weights(
        self, weights: Mapping[str, Tensor], wise_ft_alpha: float
    ) -> Mapping[str, Tensor]:
        """Return the weights of the result, if this is the end of the training.

        Parameters
        ----------
        weights : mapping of str to Tensor
            State dict after the last epoch.
        wise_ft_alpha : float
            As in `FineTunedCNNClassifier`.
        """
        if self.best_weights:
            return self.best_weights
        if self.initial_weights:
            return interpolate_weights(self.initial_weights, weights, wise_ft_alpha)
        return weights

    def validate(self, network: nn.Module, config: TrainingConfig) -> None:
        """Raise a ValueError if no training of this kind can have this state."""
        early_stopping = config.patience is not None
        names = {*HISTORY_COLUMNS} - {*VALID_COLUMNS}
        for row in self.history:  # some may be of a training without early stopping
            if row.keys() not in (names, names | {*VALID_COLUMNS}) or not all(
                type(value) in (int, float) for value in row.values()
            ):
                raise ValueError(f"each row of its history needs {sorted(names)}")
        if self.history and early_stopping != ("valid_loss" in self.history[-1]):
            names = names | {*VALID_COLUMNS} if early_stopping else names
            raise ValueError(f"the last row of its history needs {sorted(names)}")
        if not 0 <= self.best_epoch <= self.epoch <= config.max_epochs:
            raise ValueError(
                f"its epoch must be at most max_epochs={config.max_epochs}, and its "
                f"best epoch at most its epoch; got {self.epoch} and {self.best_epoch}"
            )
        epochs = [row["epoch"] for row in self.history]
        if epochs != list(range(self.epoch + 1 - len(epochs), self.epoch + 1)):
            raise ValueError(f"its history must end with epoch {self.epoch}")
        if self.epoch and epochs[:1] not in ([0], [1]):
            raise ValueError("its history must begin with epoch 0 or 1")
        if early_stopping and self.history and not self.best_weights:
            raise ValueError("the weights of the best epoch are missing")
        for weights in (self.best_weights, self.initial_weights):
            if weights:
                check_state_dict(network, weights)


@dataclass(frozen=True)
class TrainingRecord:
    """What is recorded of a completed training, besides the network.

    Attributes
    ----------
    history : list of dict
        One row per epoch.
    best_epoch : int
        Epoch of the trained weights.
    lr, head_init, wise_ft_alpha
        Settings of the training, as in `FineTunedCNNClassifier`.
    selection : list of SelectionRow
        The settings that were tried before. Empty if nothing was selected.
    """

    history: list[dict[str, float]]
    best_epoch: int
    lr: float
    head_init: str
    wise_ft_alpha: float
    selection: list[SelectionRow]


def score_rank(row: Mapping[str, float]) -> tuple[float, float]:
    """Return what the best epoch has the largest of: the score, then the least loss.

    The score is rounded, since sums of the same weights in another order differ in the
    last bits: to significant digits, since some scores have the units of the targets.
    """
    return float(f"{row['valid_score']:.6g}"), -row["valid_loss"]


def order_columns(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row of a history from a file with its columns in the usual order."""
    known = [name for name in HISTORY_COLUMNS if name in row]
    return {name: row[name] for name in [*known, *(row.keys() - {*known})]}


def parse_selection(rows: Any) -> list[SelectionRow]:
    """Return the rows of a selection from a file; raise a ValueError if one is invalid.

    Parameters
    ----------
    rows : list of dict
        Anything may be in it. The losses of single images may be missing.

    Returns
    -------
    list of SelectionRow
    """
    names = {each.name for each in fields(SelectionRow)} - {"valid_losses"}
    # The score of a regressor may be negative.
    not_negative = names - {"head_init", "valid_score"}

    def is_row(row: Any) -> bool:
        return (
            isinstance(row, dict)
            and row.keys() - {"valid_losses"} == names
            and row["head_init"] in HEAD_INITS
            and type(row["valid_score"]) in (int, float)
            and abs(row["valid_score"]) < MAX_NUMBER
            and isinstance(row.get("valid_losses", []), list)
            and all(
                type(value) in (int, float)
                and (0 <= value < MAX_NUMBER or value == math.inf)
                for value in (
                    *(row[name] for name in not_negative),
                    *row.get("valid_losses", []),
                )
            )
        )

    if not isinstance(rows, list) or not all(map(is_row, rows)):
        raise ValueError(f"each row of its selection needs {sorted(names)}")
    return [
        SelectionRow(**{**row, "valid_losses": tuple(row.get("valid_losses", ()))})
        for row in rows
    ]


def check_state_dict(network: nn.Module, weights: dict[str, Any]) -> None:
    """Raise a ValueError if a state dict does not fit a network exactly."""
    expected = {n: (v.shape, v.dtype) for n, v in network.state_dict().items()}
    if expected != {n: (v.shape, v.dtype) for n, v in weights.items()}:
        raise ValueError("its weights belong to another network")
