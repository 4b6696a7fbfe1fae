"""Settings of a training, and its state between epochs."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training, named as the parameters of the estimator.

    Attributes
    ----------
    n_trainable_stages : int
        Number of stages, counted from the head, that are trained with the head.
    freeze_batch_norm : bool
        Whether BatchNorm layers of trainable stages keep their pretrained statistics.
    patience : int or None
        Epochs without improvement after which training stops. None: no early stopping.
    device : torch.device
        Device of the network.
    precision : str
        Precision of the computation; the weights stay float32.
    optimizer, lr, layer_decay, weight_decay, lr_schedule, max_epochs, \
label_smoothing, wise_ft_alpha, unfreeze_every, batch_size, verbose
        As in `FineTunedCNNClassifier`.
    """

    n_trainable_stages: int
    freeze_batch_norm: bool
    optimizer: str
    lr: float
    layer_decay: float
    weight_decay: float
    lr_schedule: str
    max_epochs: int
    label_smoothing: float
    wise_ft_alpha: float
    unfreeze_every: int | None
    patience: int | None
    batch_size: int
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
    """

    seed: int
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    initial_weights: dict[str, Tensor] = field(default_factory=dict)

    def validate(self, network: nn.Module, config: TrainingConfig) -> None:
        """Raise a ValueError if no training of this kind can have this state."""
        early_stopping = config.patience is not None
        names = {"epoch", "train_loss", "lr", "n_trainable_stages"}
        names |= {"valid_loss", "valid_score"} if early_stopping else set()
        for row in self.history:
            if row.keys() != names or not all(
                type(value) in (int, float) for value in row.values()
            ):
                raise ValueError(f"each row of its history needs {sorted(names)}")
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


def check_state_dict(network: nn.Module, weights: dict[str, Any]) -> None:
    """Raise a ValueError if a state dict does not fit a network exactly."""
    expected = {n: (v.shape, v.dtype) for n, v in network.state_dict().items()}
    if expected != {n: (v.shape, v.dtype) for n, v in weights.items()}:
        raise ValueError("its weights belong to another network")
