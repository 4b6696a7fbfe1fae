"""The training loop: a skorch net, trained one epoch at a time.

skorch runs the steps of an epoch. The loop over epochs is here, because skorch's own
takes Ctrl-C for early stopping. All random numbers of an epoch are derived from its
number, so that a resumed training gives the same bits.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from sktl._images.preprocessing import Preprocessing
from sktl._inference.engines import reraise_out_of_memory
from sktl._inference.execution import PRECISIONS
from sktl._inference.fuse_batch_norm import fuse_batch_norm
from sktl._training.callbacks import (
    DivergenceCheck,
    GradientClipping,
    LearningRateScheduler,
    ProgressBar,
    ValidationOutputs,
    format_row,
)
from sktl._training.config import (
    TrainerState,
    TrainingConfig,
    check_state_dict,
    score_rank,
)
from sktl._training.datasets import BatchLoader, TrainingDataset
from sktl._training.network import NormalizedInput, PartiallyFrozen
from sktl._training.optim import load_optimizer_state
from sktl._training.scoring import OutputEvaluator
from sktl._training.skorch_net import make_net
from sktl._training.targets import EncodedTargets, Target
from sktl._training.user_callbacks import adapt_callbacks
from sktl._utils.random_state import temporary_seed


class Trainer:
    """Trainer of a partially frozen network.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`. It is moved to the device and trained in place.
    preprocessing : Preprocessing
        Defines mean and standard deviation of the pixels.
    target : Target
        Defines loss and validation score.
    train, valid : TrainingDataset
        Training set and validation set. Without early stopping, `valid` is None.
    config : TrainingConfig
        Settings.
    state : TrainerState
        State to start from; it is updated.
    callbacks : sequence of skorch callbacks
        Callbacks of the user, from `copy_callbacks`.

    Attributes
    ----------
    network : nn.Sequential
        The network in training.
    state : TrainerState
        Current state.
    config : TrainingConfig
        As given.
    net : skorch.NeuralNet
        Takes pixels ``(n, side, side, 3)``, uint8.
    """

    def __init__(
        self,
        network: nn.Sequential,
        preprocessing: Preprocessing,
        target: Target,
        train: TrainingDataset,
        valid: TrainingDataset | None,
        *,
        config: TrainingConfig,
        state: TrainerState,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.network = network
        self.state = state
        self.config = config
        self._first_epoch = state.epoch  # of this call of fit, resumed or not
        self._target = target
        self._train, self._valid = train, valid
        self._callbacks = callbacks
        self._n_steps_per_epoch = len(BatchLoader(train, config.batch_size))
        network.to(config.device)
        network.to(memory_format=torch.channels_last)
        self._partial = PartiallyFrozen(
            network,
            config.n_trainable_in(state.epoch),
            PRECISIONS[config.precision],
            config.freeze_batch_norm,
            partial(_fuse_prefix, preprocessing, config.device),
        )
        self._unfreeze(config.n_trainable_in(state.epoch))
        n_steps = config.max_epochs * self._n_steps_per_epoch
        self._scheduler = LearningRateScheduler(
            config.lr_schedule, self._n_steps_per_epoch, config.max_epochs
        )
        self._divergence_check = DivergenceCheck(config.lr)
        self._validation_outputs = ValidationOutputs()
        self._progress_bar = ProgressBar(n_steps, config.max_epochs)
        self.net = make_net(
            NormalizedInput(self._partial, preprocessing),
            network,
            target,
            config,
            valid,
            [
                ("sktl_scheduler", self._scheduler),
                ("sktl_gradient_clipping", GradientClipping()),
                ("sktl_divergence_check", self._divergence_check),
                ("sktl_validation_outputs", self._validation_outputs),
                ("sktl_progress_bar", self._progress_bar),
                *callbacks,
            ],
        )
        self._evaluator = OutputEvaluator(config.scoring, target, self.net)

    @property
    def n_frozen(self) -> int:
        """Number of parts of the network that are frozen now."""
        return self._partial.n_frozen

    @property
    def diverged(self) -> bool:
        """Whether the training was ended by weights or a loss that are not finite."""
        return self._divergence_check.diverged

    def run(
        self,
        after_epoch: Callable[["Trainer"], bool] | None = None,
        before_epoch: Callable[[], None] | None = None,
    ) -> None:
        """Train until `max_epochs` are completed or early stopping ends the training.

        Parameters
        ----------
        after_epoch, before_epoch : callable, default=None
            Called after and before each epoch. If `after_epoch` returns True, the
            training ends.

        Raises
        ------
        KeyboardInterrupt
            On Ctrl-C.
        MemoryError
            If a batch does not fit into memory.
        ValueError
            If the loss is not finite, or an image cannot be read.
        """
        config, state = self.config, self.state
        bar: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if config.verbose == 1:
            bar = self._progress_bar.show(state.epoch * self._n_steps_per_epoch)
        with self._adapted_callbacks():
            self.net.notify("on_train_begin", X=self._train, y=None)
            with bar:
                while state.epoch < config.max_epochs and not self._should_stop():
                    if before_epoch is not None:
                        before_epoch()
                    self._run_epoch()
                    if after_epoch is not None and after_epoch(self):
                        break
            self.net.notify("on_train_end", X=self._train, y=None)
        weights = self.network.state_dict()
        self.network.load_state_dict(state.final_weights(weights, config.wise_ft_alpha))
        self._release_memory()
        self.network.eval()

    def copy_weights(self) -> dict[str, Tensor]:
        """Return a copy of the state dict of the network, on the CPU."""
        # On the CPU, since an accelerator may lack the memory for a copy.
        weights = self.network.state_dict()
        return {name: value.to("cpu", copy=True) for name, value in weights.items()}

    def outputs(self, dataset: TrainingDataset) -> Tensor:
        """Return the outputs for all images of a dataset: ``(n, n_outputs)``, float32.

        Parameters
        ----------
        dataset : TrainingDataset
            Such as the validation set. It is set to the current frozen depth.
        """
        dataset.set_frozen_depth(self.n_frozen)
        dataset.cache_activations(1)
        batch_size = self.config.evaluation_batch_size
        batches = BatchLoader(dataset, batch_size)
        with reraise_out_of_memory(batch_size):
            parts = [self.net.evaluation_step(batch).cpu() for batch in batches]
        return torch.cat(parts)

    @contextlib.contextmanager
    def _adapted_callbacks(self) -> Iterator[None]:
        """Call the callbacks of the user with labels, during the training only."""
        initialized = self.net.callbacks_
        self.net.callbacks_ = adapt_callbacks(
            initialized, self._callbacks, self._target, self.config.verbose
        )
        try:
            yield
        finally:
            self.net.callbacks_ = initialized

    def _release_memory(self) -> None:
        """Release what the net, a fitted attribute, would keep alive."""
        self._partial.fuse_prefix = None
        self._partial.release_prefix()
        self.net.train_split = None
        self.net.optimizer_.zero_grad()

    def _run_epoch(self) -> None:
        config, state = self.config, self.state
        n_trainable = config.n_trainable_in(state.epoch)
        if n_trainable != self._n_trainable:
            self._unfreeze(n_trainable)
        self._scheduler.start_epoch(state.epoch)
        self._divergence_check.start_epoch(state.epoch)
        self._progress_bar.start_epoch(state.epoch)
        for dataset in self._datasets():
            dataset.cache_activations(config.max_epochs - state.epoch)
        with (
            temporary_seed(config.device, state.seed, state.epoch),
            reraise_out_of_memory(config.batch_size),
            _reraise_batch_norm_error(),
            torch.enable_grad(),
        ):
            # Not `fit`, which takes Ctrl-C for early stopping.
            self.net.fit_loop(self._train, epochs=1)
        state.epoch += 1
        self._check_weights()
        history = self.net.history
        row = {"epoch": state.epoch, "train_loss": float(history[-1, "train_loss"])}
        if config.patience is not None:
            row["valid_loss"] = float(history[-1, "valid_loss"])
            row["valid_score"] = self._evaluator.score(
                *self._validation_outputs.last(), row["valid_loss"]
            )
        row["lr"] = float(self._scheduler.lr)
        row["n_trainable_stages"] = int(n_trainable)
        self._record(row)

    def _check_weights(self) -> None:
        """Raise a ValueError if a trained weight is not finite."""
        weights = self.network[self._partial.n_frozen :].state_dict().values()
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            raise self._divergence_check.error(
                "weights", "NaN or infinity", self.state.epoch
            )

    def _datasets(self) -> list[TrainingDataset]:
        return [self._train] if self._valid is None else [self._train, self._valid]

    def _unfreeze(self, n_trainable: int) -> None:
        self._n_trainable = n_trainable
        self._partial.unfreeze(n_trainable)
        for dataset in self._datasets():
            dataset.set_frozen_depth(self._partial.n_frozen)

    def _record(self, row: dict[str, float]) -> None:
        """Append a row to the history, and keep the weights of the best epoch."""
        state = self.state
        state.history.append(row)
        self._progress_bar.end_epoch(row)
        if self.config.verbose > 1:
            tqdm.write(format_row(row, self.config.max_epochs))
        if self.config.patience is None:
            state.best_epoch = state.epoch
            return
        score = score_rank(row)
        if score > state.best_score:
            state.best_epoch, state.best_score = state.epoch, score
            state.best_weights = self.copy_weights()

    def _should_stop(self) -> bool:
        patience = self.config.patience
        n_waited = self.state.epoch - max(self.state.best_epoch, self._first_epoch)
        return patience is not None and n_waited >= patience

    def record_initial_epoch(
        self,
        features: NDArray[np.float32],
        targets: EncodedTargets,
        held_out: NDArray[np.bool_],
    ) -> None:
        """Record the state before training as epoch 0.

        Parameters
        ----------
        features : ndarray of shape (n, n_features)
            Input of the head for each image.
        targets : EncodedTargets
            Targets and weights of the images.
        held_out : ndarray of shape (n,), bool
            Mask of the validation set.
        """
        head, device = self.network[-1].eval(), self.config.device
        with torch.inference_mode():
            outputs = head(torch.from_numpy(features).to(device)).float().cpu()
        head.train()

        def part(mask: NDArray[np.bool_]) -> tuple[Tensor, NDArray[Any], NDArray[Any]]:
            rows = outputs[torch.from_numpy(mask)]
            return rows, targets.y[mask], targets.sample_weight[mask]

        train_loss = self._evaluator.loss(*part(~held_out))
        row: dict[str, float] = {"epoch": 0, "train_loss": train_loss}
        config = self.config
        if config.patience is not None:
            row |= self._validation_columns(*part(held_out))
        self._record({**row, "lr": 0.0, "n_trainable_stages": 0})
        # Networks with different BatchNorm statistics cannot be interpolated.
        if config.freeze_batch_norm and config.patience is None:
            if config.wise_ft_alpha < 1:
                self.state.initial_weights = self.copy_weights()

    def score_best_weights(self) -> None:
        """Score the weights to continue with, which are the best ones so far.

        Their score in the previous training may be one of other images, or of another
        `scoring`.
        """
        assert self._valid is not None
        y, weight = self._valid.targets(np.arange(len(self._valid)))
        outputs = self.outputs(self._valid)
        row = self._validation_columns(outputs, y.numpy(), weight.double().numpy())
        self.state.best_score = score_rank(row)

    def _validation_columns(
        self, outputs: Tensor, y: NDArray[Any], sample_weight: NDArray[np.float64]
    ) -> dict[str, float]:
        loss = self._evaluator.loss(outputs, y, sample_weight)
        score = self._evaluator.score(outputs.numpy(), y, sample_weight, loss)
        return {"valid_loss": loss, "valid_score": score}

    def load_state(
        self,
        weights: Mapping[str, Tensor],
        state: TrainerState,
        optimizer: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        """Load the state of an interrupted training.

        Parameters
        ----------
        weights : mapping of str to Tensor
            State dict of the network.
        state : TrainerState
            State after the last completed epoch.
        optimizer : mapping
            As in `load_optimizer_state`.

        Raises
        ------
        ValueError
            If they belong to another training.
        """
        state.validate(self.network, self.config)
        check_state_dict(self.network, dict(weights))
        self.network.load_state_dict(weights)
        self.state = state
        # Drop the fused prefix, which was made of other weights.
        self._unfreeze(self.config.n_trainable_in(state.epoch))
        self._load_optimizer(optimizer)

    def continue_optimizer(self, previous: torch.optim.Optimizer) -> None:
        """Load the state of the optimizer of the previous training, if it is alike.

        Parameters
        ----------
        previous : torch.optim.Optimizer
            From a training of the same network, perhaps with other trainable stages.
        """
        optimizer = self.net.optimizer_
        if type(previous) is type(optimizer):
            # The head comes first, so that fewer trainable stages have fewer states.
            n_trained = sum(len(group["params"]) for group in optimizer.param_groups)
            state = previous.state_dict()["state"].items()
            self._load_optimizer({n: v for n, v in state if n < n_trained})

    def _load_optimizer(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        load_optimizer_state(self.net.optimizer_, self.config.optimizer, state)


def _fuse_prefix(
    preprocessing: Preprocessing, device: torch.device, prefix: nn.Sequential
) -> nn.Sequential:
    """Return a copy of the frozen prefix with fused BatchNorm."""
    fused = copy.deepcopy(prefix).cpu().eval()
    with torch.no_grad():
        fuse_batch_norm(fused, preprocessing.crop_size, preprocessing.n_channels)
    fused.to(device)
    return fused.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def _reraise_batch_norm_error() -> Iterator[None]:
    """Reraise torch's error for BatchNorm on a single value with advice."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "BatchNorm must get more than one value per channel to train. Got batches "
            "of one image with one position left. Raise batch_size or image_size, or "
            "train fewer stages."
        ) from error
