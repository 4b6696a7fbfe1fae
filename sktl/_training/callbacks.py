"""Training callbacks of skorch: learning rate, clipping, scores, progress, divergence.

skorch calls them for each batch. Each has one concern; `Trainer` reads the learning
rate and the validation score from them after each epoch.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skorch.callbacks import Callback
from torch import nn
from tqdm.auto import tqdm

from sktl._training.optim import lr_lambda

_MAX_GRADIENT_NORM = 5.0  # norm over all trained parameters
_SHOWN = ("train_loss", "valid_loss", "valid_score")


def format_row(row: Mapping[str, float], max_epochs: int) -> str:
    """Return a row of the history as a line of text."""
    shown = (f"{name} {row[name]:.4f}" for name in _SHOWN if name in row)
    return f"Epoch {row['epoch']}/{max_epochs}: {', '.join(shown)}, lr {row['lr']:.2g}"


class LearningRateScheduler(Callback):
    """Set the learning rates of each step by a learning rate schedule.

    Parameters
    ----------
    lr_schedule : str
        As in `lr_lambda`.
    n_steps_per_epoch, n_epochs : int
        Length of the training.

    Attributes
    ----------
    lr : float
        Learning rate of the last step, without the factors of single groups.
    """

    def __init__(self, lr_schedule: str, n_steps_per_epoch: int, n_epochs: int) -> None:
        self.lr_schedule = lr_schedule
        self.n_steps_per_epoch = n_steps_per_epoch
        self.n_epochs = n_epochs
        self.lr = 0.0
        self._step = 0

    def start_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, from 0, also after a resumed training."""
        self._step = epoch * self.n_steps_per_epoch

    def on_batch_begin(
        self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        """Set the learning rate of each parameter group."""
        if not training:
            return
        n_steps = self.n_epochs * self.n_steps_per_epoch
        factor = lr_lambda(self.lr_schedule, self._step, n_steps)
        for group in net.optimizer_.param_groups:
            group["lr"] = factor * group["max_lr"]
        self.lr = factor * net.lr
        self._step += 1


class GradientClipping(Callback):
    """Clip the norm of the gradient of the trained parameters.

    skorch's own callback iterates over all parameters of the network in each step,
    which takes longer than training the head alone.
    """

    def on_grad_computed(self, net: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient in place."""
        groups = net.optimizer_.param_groups
        trained = [p for group in groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)


class ValidationOutputs(Callback):
    """Record the outputs for the validation set in each epoch."""

    def __init__(self) -> None:
        self._batches: list[tuple[Any, Any, Any]] = []

    def on_epoch_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        """Discard the batches of the last epoch."""
        self._batches.clear()

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        """Store the outputs of a validation batch."""
        if not training:
            y, sample_weight = batch[1]
            self._batches.append((kwargs["y_pred"].float().cpu(), y, sample_weight))

    def on_train_end(self, net: Any, *args: Any, **kwargs: Any) -> None:
        """Release the memory."""
        self._batches.clear()

    def last(self) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.float64]]:
        """Return outputs, encoded targets and weights of the last epoch."""
        outputs, y, weight = (
            np.concatenate([part.numpy() for part in parts])
            for parts in zip(*self._batches, strict=True)
        )
        return outputs, y, weight.astype(np.float64)


class DivergenceCheck(Callback):
    """Raise a ValueError when the training loss is not finite.

    Parameters
    ----------
    lr : float
        Learning rate, named in the error.

    Attributes
    ----------
    diverged : bool
        Whether that has happened.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.diverged = False
        self._epoch = 0

    def start_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, from 0."""
        self._epoch = epoch

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        """Check the loss of a training batch."""
        if training:
            loss = net.history[-1, "batches", -1, "train_loss"]
            if not math.isfinite(loss):
                raise self.error("loss", str(loss), self._epoch + 1)

    def error(self, what: str, got: str, epoch: int) -> ValueError:
        """Return the error for weights or a loss that are not finite in an epoch."""
        self.diverged = True
        return ValueError(
            f"The {what} must be finite during training. Got {got} in epoch {epoch} "
            f"with lr={self.lr}. Reduce lr, or train fewer stages."
        )


class ProgressBar(Callback):
    """Show a progress bar over the steps of all epochs.

    Parameters
    ----------
    n_steps, max_epochs : int
        Number of steps and of epochs of the training.
    """

    def __init__(self, n_steps: int, max_epochs: int) -> None:
        self.n_steps = n_steps
        self.max_epochs = max_epochs
        self._bar: Any = None

    @contextlib.contextmanager
    def show(self, n_done: int) -> Iterator[None]:
        """Show the bar while in the context, with some steps already done."""
        total, delay = self.n_steps, 1  # seconds before the bar is shown
        with tqdm(total=total, initial=n_done, unit="step", delay=delay) as self._bar:
            yield
        self._bar = None

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        """Advance the bar by one training step."""
        if training and self._bar is not None:
            self._bar.update()

    def start_epoch(self, epoch: int) -> None:
        """Show the number of the epoch, from 0."""
        if self._bar is not None:
            text = f"Epoch {epoch + 1}/{self.max_epochs}"
            # Not at once, since the bar may not be shown yet.
            self._bar.set_description(text, refresh=False)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Show the loss and the validation score of an epoch."""
        if self._bar is not None:
            shown = {name: row[name] for name in _SHOWN if name in row}
            self._bar.set_postfix(shown, refresh=False)
