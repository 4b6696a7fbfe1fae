"""The training of a partly frozen network: a skorch net, and its epochs.

skorch does a step and an epoch; what stands around it is here, in one visible loop:
everything random of an epoch comes from its number, so that an interrupted run goes on
with the bits it would have had; the best epoch is kept; and an interrupt is an
interrupt.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skorch import NeuralNet
from skorch.callbacks import Callback
from skorch.helper import predefined_split
from torch import Tensor, nn
from tqdm.auto import tqdm

from sktl._images.preprocessing import Normalization, Preprocessing
from sktl._inference.engines import reraise_out_of_memory
from sktl._inference.execution import PRECISIONS
from sktl._inference.fuse_batch_norm import fuse_batch_norm
from sktl._training.datasets import BatchLoader, TrainingDataset
from sktl._training.network import PartiallyFrozen
from sktl._training.optim import (
    WeightedCrossEntropy,
    load_optimizer_state,
    lr_lambda,
    make_optimizer,
)
from sktl._utils.random_state import temporary_seed

_LARGEST_GRADIENT = 5.0  # norm over all parameters; a step in a smooth loss has less


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; named and explained as in `FineTunedCNNClassifier`."""

    n_trainable_stages: int
    fixed_statistics: bool  # of BatchNorm
    optimizer: str
    lr: float
    layer_decay: float
    weight_decay: float
    lr_schedule: str
    max_epochs: int
    label_smoothing: float
    wise_ft_alpha: float
    unfreeze_every: int | None
    patience: int | None  # n_iter_no_change, or None without early stopping
    batch_size: int
    device: torch.device
    precision: str
    verbose: int

    @classmethod
    def parameters(cls) -> list[str]:
        """Name those that are parameters of the estimator as they are."""
        derived = {"n_trainable_stages", "fixed_statistics", "patience"}
        derived |= {"device", "precision"}  # what "auto" is on this machine
        return [each.name for each in fields(cls) if each.name not in derived]

    def n_trainable_in(self, epoch: int) -> int:
        """Say how many stages train in an epoch, counted from 0."""
        if self.unfreeze_every is None:
            return self.n_trainable_stages
        return min(self.n_trainable_stages, int(epoch // self.unfreeze_every))


@dataclass
class TrainerState:
    """How far a training is; with the weights, all that it needs to go on.

    Attributes
    ----------
    seed : int
        From which, with the number of an epoch, everything random of it comes.
    epoch : int
        Number of epochs done.
    history : list of dict
        One row for each epoch, the first of which may be the state before training.
    best_epoch : int
        The best so far; without early stopping the last.
    best_score : tuple of two floats
        Accuracy on the held-out part, and its loss with a minus.
    best_weights : dict of str to Tensor
        Of that epoch; empty without early stopping.
    start_weights : dict of str to Tensor
        Of epoch 0, to be mixed into the last; empty if they are not to be.
    """

    seed: int
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    start_weights: dict[str, Tensor] = field(default_factory=dict)

    def check(self, network: nn.Module, settings: TrainingConfig) -> None:
        """Raise a ValueError if no training of this kind can stand there."""
        watched = settings.patience is not None
        names = {"epoch", "train_loss", "lr", "n_trainable_stages"}
        names |= {"valid_loss", "valid_score"} if watched else set()
        for row in self.history:
            if row.keys() != names or not all(
                type(value) in (int, float) for value in row.values()
            ):
                raise ValueError(f"its history must have numbers for {sorted(names)}")
        if not 0 <= self.best_epoch <= self.epoch <= settings.max_epochs:
            raise ValueError(f"epoch {self.epoch} is none of {settings.max_epochs}")
        if watched and self.history and not self.best_weights:
            raise ValueError("there are no weights of the best epoch")
        own = {n: (v.shape, v.dtype) for n, v in network.state_dict().items()}
        for weights in (self.best_weights, self.start_weights):
            if weights and own != {n: (v.shape, v.dtype) for n, v in weights.items()}:
                raise ValueError("there are weights of another network")


class Trainer:
    """A network in training.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`. It is moved to the device, and trained in place.
    preprocessing : Preprocessing
        Whose mean and deviation the pixels are normalized with.
    training : ImageDataset or ActivationDataset
        To learn from.
    validation : ImageDataset, ActivationDataset or None
        To tell the best epoch by.
    settings : TrainingConfig
        How.
    progress : TrainerState
        Where it stands; it is kept up to date.
    callbacks : sequence of skorch callbacks
        Of the user's.

    Attributes
    ----------
    network : nn.Sequential
        What is trained.
    progress : TrainerState
        Where it stands.
    net : skorch.NeuralNet
        Takes pixels ``(n, side, side, 3)``, uint8.
    """

    def __init__(
        self,
        network: nn.Sequential,
        preprocessing: Preprocessing,
        training: TrainingDataset,
        validation: TrainingDataset | None,
        *,
        settings: TrainingConfig,
        progress: TrainerState,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.progress = progress
        self._settings = settings
        self.network = network
        self._training = training
        network.to(settings.device)
        network.to(memory_format=torch.channels_last)
        precision = PRECISIONS[settings.precision]
        self._n_trainable = settings.n_trainable_in(progress.epoch)
        self._validation = validation
        self._partial = PartiallyFrozen(
            network,
            self._n_trainable,
            precision,
            settings.fixed_statistics,
            partial(_folded, side=preprocessing.crop_size, device=settings.device),
        )
        self._open(self._n_trainable)
        self._watch = TrainingCallback(
            settings, len(BatchLoader(training, settings.batch_size))
        )
        self.net = NeuralNet(
            NormalizedInput(self._partial, preprocessing),
            WeightedCrossEntropy,
            criterion__label_smoothing=settings.label_smoothing,
            optimizer=partial(
                make_optimizer,
                network,
                settings.n_trainable_stages,
                settings.optimizer,
                settings.layer_decay,
                settings.weight_decay,
            ),
            lr=settings.lr,
            batch_size=settings.batch_size,
            iterator_train=BatchLoader,
            iterator_train__shuffle=True,
            iterator_valid=BatchLoader,
            train_split=None if validation is None else predefined_split(validation),
            callbacks=[
                ("sktl_watch", self._watch),
                *callbacks,
            ],
            callbacks__print_log=None,
            device=settings.device,
            verbose=0,
        ).initialize()

    @property
    def n_frozen(self) -> int:
        """How many parts of the network, from below, are frozen now."""
        return self._partial.n_frozen

    def run(self, after_epoch: Callable[["Trainer"], None] | None = None) -> None:
        """Train until `max_epochs` are done, or early stopping says so.

        Parameters
        ----------
        after_epoch : callable, default=None
            Called after each epoch, to save it.

        Raises
        ------
        KeyboardInterrupt
            On Ctrl-C.
        MemoryError
            If a batch does not fit into memory.
        ValueError
            If the loss is not finite, or an image cannot be read.
        """
        settings, progress = self._settings, self.progress
        self.net.notify("on_train_begin", X=self._training, y=None)
        with self._watch.bar(progress.epoch):
            while progress.epoch < settings.max_epochs and not self._is_over():
                self._epoch()
                if after_epoch is not None:
                    after_epoch(self)
        self.net.notify("on_train_end", X=self._training, y=None)
        if progress.best_weights:
            self.network.load_state_dict(progress.best_weights)
        elif progress.start_weights:
            self.network.load_state_dict(self._mixed())
        # Else the net, which is left behind, would hold the images that were watched,
        # a gradient for each weight, and a copy of what was frozen.
        self._partial.fused_prefix = None
        self._partial.unfreeze(self._n_trainable)
        self.net.train_split = None
        self.net.optimizer_.zero_grad()
        self.network.eval()

    def _epoch(self) -> None:
        settings, progress = self._settings, self.progress
        n_trainable = settings.n_trainable_in(progress.epoch)
        if n_trainable != self._n_trainable:
            self._open(n_trainable)
        self._watch.start(progress.epoch)
        for dataset in (self._training, self._validation):
            if dataset is not None:
                dataset.cache_activations(settings.max_epochs - progress.epoch)
        with (
            temporary_seed(settings.device, progress.seed, progress.epoch),
            reraise_out_of_memory(settings.batch_size),
            _reraise_batch_norm_error(),
            torch.enable_grad(),
        ):
            # Not `fit`, which takes an interrupt for the wish to stop early.
            self.net.fit_loop(self._training, epochs=1)
        progress.epoch += 1
        trained = self.network[self._partial.n_frozen :]
        state = trained.state_dict().values()
        if not torch.stack([value.isfinite().all() for value in state]).all():
            raise _diverged("weights", "NaN or infinity", progress.epoch, settings.lr)
        row = {
            "epoch": progress.epoch,
            "train_loss": float(self.net.history[-1, "train_loss"]),
        }
        if settings.patience is not None:
            row["valid_loss"] = float(self.net.history[-1, "valid_loss"])
            row["valid_score"] = self._watch.accuracy()
        row["lr"] = float(self._watch.rate)
        row["n_trainable_stages"] = int(n_trainable)
        self._record(row)

    def _open(self, n_trainable: int) -> None:
        """Let some stages train from now on."""
        self._n_trainable = n_trainable
        self._partial.unfreeze(n_trainable)
        for dataset in (self._training, self._validation):
            if dataset is not None:
                dataset.set_frozen_depth(self._partial.n_frozen)

    def _record(self, row: dict[str, float]) -> None:
        """Enter an epoch, and keep its weights if it is the best."""
        progress = self.progress
        progress.history.append(row)
        if self._settings.patience is None:
            progress.best_epoch = progress.epoch
            return
        # Of epochs with the same hits, the one with the lower loss. Rounded, since
        # sums of the same weights in another order differ in the last bits.
        score = (round(row["valid_score"], 6), -row["valid_loss"])
        if score > progress.best_score:
            progress.best_epoch, progress.best_score = progress.epoch, score
            progress.best_weights = self._copied()

    def _copied(self) -> dict[str, Tensor]:
        # On the CPU: an accelerator may have no room for them.
        state = self.network.state_dict()
        return {name: value.to("cpu", copy=True) for name, value in state.items()}

    def _mixed(self) -> dict[str, Tensor]:
        """Mix the weights of epoch 0 and of the last (Wortsman et al., 2022)."""
        start, alpha = self.progress.start_weights, self._settings.wise_ft_alpha
        return {
            name: start[name].to(end.device).lerp(end, alpha)
            if end.is_floating_point()
            else end
            for name, end in self.network.state_dict().items()
        }

    def _is_over(self) -> bool:
        patience = self._settings.patience
        waited = self.progress.epoch - self.progress.best_epoch
        return patience is not None and waited >= patience

    def begin(
        self,
        features: NDArray[np.float32],
        label: NDArray[np.intp],
        weight: NDArray[np.float64],
        held_out: NDArray[np.bool_],
    ) -> None:
        """Make the head as it is now epoch 0, from what it says of known features.

        Parameters
        ----------
        features : ndarray of shape (n, n_features)
            What the head sees of each image.
        label, weight : ndarray of shape (n,)
            Theirs.
        held_out : ndarray of shape (n,), bool
            Which of them are not trained on.
        """
        head = self.network[-1].eval()
        with torch.inference_mode():
            x = torch.from_numpy(features).to(self._settings.device)
            logits = head(x).float().cpu()
        head.train()
        target = torch.from_numpy(label), torch.from_numpy(weight).float()

        def loss(chosen: NDArray[np.bool_]) -> float:
            at = torch.from_numpy(chosen)
            chosen_target = target[0][at], target[1][at]
            result: Tensor = self.net.criterion_(logits[at], chosen_target)
            return result.item()

        row: dict[str, float] = {"epoch": 0, "train_loss": loss(~held_out)}
        if self._settings.patience is not None:
            hits = logits.numpy().argmax(axis=1) == label
            row["valid_loss"] = loss(held_out)
            row["valid_score"] = float(
                np.average(hits[held_out], weights=weight[held_out])
            )
        self._record({**row, "lr": 0.0, "n_trainable_stages": 0})
        settings = self._settings
        # Between two networks that normalize differently lies none that works.
        if settings.fixed_statistics and settings.patience is None:
            if settings.wise_ft_alpha < 1:
                self.progress.start_weights = self._copied()

    def restore(
        self,
        weights: Mapping[str, Tensor],
        progress: TrainerState,
        optimizer: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        """Go back to where a training was: with the same bits from there on."""
        progress.check(self.network, self._settings)
        self.network.load_state_dict(weights)
        self.progress = progress
        # Again: what is frozen has other weights now.
        self._open(self._settings.n_trainable_in(progress.epoch))
        load_optimizer_state(self.net.optimizer_, optimizer)


def warn_of_shared_gpu(device: torch.device) -> None:
    """Warn in a worker process of joblib that it shares a GPU with the others."""
    if device.type == "cpu" or not current_process().name.startswith("Loky"):
        return
    if torch.accelerator.device_count() == 1:
        warnings.warn(
            "Several worker processes train on one GPU: each has its own copy of "
            "everything, they slow each other down, and its memory may not do for all. "
            "Search with n_jobs=1, or give each worker a GPU of its own.",
            UserWarning,
            stacklevel=3,
        )


def _folded(frozen: nn.Sequential, *, side: int, device: torch.device) -> nn.Sequential:
    """Give a copy without BatchNorm: what does not train needs none of its own."""
    mine = copy.deepcopy(frozen).cpu().eval()
    with torch.no_grad():
        fuse_batch_norm(mine, side)
    mine.to(device)
    return mine.to(memory_format=torch.channels_last)


def _layout_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


class NormalizedInput(nn.Module):
    """A network that normalizes what it is given, on its own device."""

    def __init__(self, partly: PartiallyFrozen, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.partially_frozen = partly
        self.normalization = Normalization(preprocessing)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits ``(n, n_classes)`` of pixels or of activations.

        Pixels are ``(n, side, side, 3)``, uint8; activations what the frozen part gives
        of them, float32.
        """
        if x.dtype != torch.uint8:
            return self.partially_frozen.forward_trainable(
                x.contiguous(memory_format=_layout_of(x))
            )
        logits: Tensor = self.partially_frozen(self.normalization(x))
        return logits


class TrainingCallback(Callback):
    """Sets the rate of each step, clips gradients, counts hits, looks at the loss."""

    def __init__(self, settings: TrainingConfig, n_batches: int) -> None:
        self.settings = settings
        self.n_batches = n_batches
        self.rate = 0.0  # of the head, in the last step
        self._bar: Any = None
        self.start(0)

    def start(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""
        self._step = epoch * self.n_batches
        self._hits = self._weight = 0.0

    def accuracy(self) -> float:
        """Give the weighted share of hits on what is held out."""
        return self._hits / self._weight

    @contextlib.contextmanager
    def bar(self, epoch: int) -> Iterator[None]:
        """Show a bar from there on, if anything is to be shown."""
        if not self.settings.verbose:
            yield
            return
        n_steps = self.settings.max_epochs * self.n_batches
        done = epoch * self.n_batches
        with tqdm(total=n_steps, initial=done, unit="step", delay=1) as self._bar:
            yield
        self._bar = None

    def on_batch_begin(
        self, net: Any, batch: Any = None, training: bool = False, **rest: Any
    ) -> None:
        """Set the rates."""
        if training:
            n_steps = self.settings.max_epochs * self.n_batches
            factor = lr_lambda(self.settings.lr_schedule, self._step, n_steps)
            for group in net.optimizer_.param_groups:
                group["lr"] = factor * group["highest_lr"]
            self.rate = net.optimizer_.param_groups[0]["lr"]

    def on_grad_computed(self, net: Any, *args: Any, **rest: Any) -> None:
        """Clip the norm of what trains; skorch's own would go through all there is."""
        groups = net.optimizer_.param_groups
        trained = [p for group in groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, _LARGEST_GRADIENT)

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool = False, **rest: Any
    ) -> None:
        """Look at what came out."""
        label, weight = batch[1]
        if not training:
            hits = rest["y_pred"].argmax(1).cpu() == label
            self._hits += float((hits * weight).sum())
            self._weight += float(weight.sum())
            return
        self._step += 1
        if self._bar is not None:
            self._bar.update()
        loss = net.history[-1, "batches", -1, "train_loss"]
        if not math.isfinite(loss):
            epoch = (self._step - 1) // self.n_batches + 1
            raise _diverged("loss", str(loss), epoch, self.settings.lr)


@contextlib.contextmanager
def _reraise_batch_norm_error() -> Iterator[None]:
    """Turn what torch says where BatchNorm has one value to normalize."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "BatchNorm must see more than one value of a channel to train. Got batches "
            "of one image, of which one position is left. Raise batch_size or "
            "image_size, or train fewer stages."
        ) from error


def _diverged(what: str, got: str, epoch: int, lr: float) -> ValueError:
    return ValueError(
        f"The {what} in training must be finite. Got {got} in epoch {epoch} with "
        f"lr={lr}. Reduce lr, or train fewer stages."
    )
