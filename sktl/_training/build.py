"""Assembly of a fit from the parameters of an estimator and its data.

Modules below this one get typed settings, and never see the estimator.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from sktl._images.sequence import ImageSequence
from sktl._inference.execution import ExecutionConfig
from sktl._training.checkpoint import Checkpoint, run_fingerprint
from sktl._training.config import RANDOM, TrainerState, TrainingConfig
from sktl._training.frozen_activations import FrozenActivations
from sktl._training.initial_model import FittedModel, InitialModel, ModelConfig
from sktl._training.network import count_trainable_stages
from sktl._training.serialization import describe_model
from sktl._training.targets import EncodedTargets, Target, validation_mask
from sktl._training.trainer import Trainer
from sktl._training.training_sets import (
    TrainingData,
    TrainingSets,
    build_frozen_activations,
)

_N_STEPS = 300  # of a training, if the batch size can be chosen
_BATCH_SIZES = (8, 32)


@dataclass(frozen=True, eq=False)
class FitParts:
    """What one fit consists of.

    Attributes
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    model : InitialModel
        The network.
    data : TrainingData
        Images and targets.
    activations : FrozenActivations
        Of all images.
    sets : TrainingSets
        Of the data.
    state : TrainerState
        State to start from.
    checkpoint : Checkpoint or None
        Open, if the parameters define one.
    is_new, partial : bool
        Whether the training starts from the backbone; whether it is that of
        `partial_fit`.
    """

    estimator: Any
    model: InitialModel
    data: TrainingData
    activations: FrozenActivations
    sets: TrainingSets
    state: TrainerState
    checkpoint: Checkpoint | None
    is_new: bool
    partial: bool

    @property
    def fits_probe(self) -> bool:
        """Whether the head is initialized with a linear probe."""
        targets = self.data.targets
        linear_probe = self.estimator.head_init != RANDOM
        return self.is_new and linear_probe and targets.target.is_complete(targets.y)

    @property
    def interpolates(self) -> bool:
        """Whether the weights are interpolated with those of the linear probe."""
        estimator = self.estimator
        pretrained = estimator.weights is not None
        return (
            self.fits_probe
            and pretrained
            and not (self.partial or estimator.early_stopping)
        )


def prepare_fit(
    estimator: Any,
    images: ImageSequence,
    targets: EncodedTargets,
    fitted: FittedModel | None,
    *,
    partial: bool,
) -> FitParts:
    """Return the parts of a fit; nothing is computed yet.

    Parameters
    ----------
    estimator, images, targets, fitted, partial
        As in `sktl._training.fit.fit_model`.

    Returns
    -------
    FitParts
    """
    seed = int(check_random_state(estimator.random_state).randint(2**31 - 1))
    checkpoint = None
    if not partial and estimator.checkpoint is not None:
        checkpoint = Checkpoint(estimator.checkpoint)
        seed = checkpoint.seed(default=seed)
    model = build_initial_model(estimator, targets.target, fitted, seed)
    min_size = model.preprocessing.min_decode_size(estimator.reducing_gap)
    images = images.subset(targets.rows.tolist()).with_min_decode_size(min_size)
    fraction = estimator.validation_fraction if estimator.early_stopping else None
    data = TrainingData(images, targets, validation_mask(targets, fraction, seed))
    activations = build_frozen_activations(estimator, model, images)
    sets = TrainingSets(estimator, model, data, activations, seed)
    state = TrainerState(seed)
    is_new = fitted is None
    if not is_new and (partial or estimator.max_epochs > estimator.n_iter_):
        state = _continued_state(estimator, model, seed)
    if checkpoint is not None:
        parameters = estimator.get_params(deep=False)
        fingerprint = run_fingerprint(parameters, images, targets, model.digest)
        description = describe_model(estimator, model, targets.target)
        state.selection = checkpoint.open(fingerprint, description)
    return FitParts(
        estimator, model, data, activations, sets, state, checkpoint, is_new, partial
    )


def _continued_state(estimator: Any, model: InitialModel, seed: int) -> TrainerState:
    """Return the state after the last epoch of a fitted estimator."""
    state = TrainerState(seed, estimator.n_iter_, list(estimator.history_))
    if estimator.early_stopping:
        state.best_epoch = estimator.best_epoch_
        state.best_weights = copy.deepcopy(model.network.state_dict())
    return state


def build_initial_model(
    estimator: Any, target: Target, fitted: FittedModel | None, seed: int
) -> InitialModel:
    """Return the network to train: a backbone with a new head, or a fitted one.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    target : Target
        Determines the number of outputs.
    fitted : FittedModel or None
        Model to continue with. None: start from the backbone.
    seed : int
        As in `InitialModel.from_backbone`.

    Returns
    -------
    InitialModel
    """
    config = ModelConfig.from_estimator(estimator)
    if fitted is not None:
        return InitialModel.from_fitted(fitted, config)
    return InitialModel.from_backbone(
        config,
        estimator.weights,
        target.n_outputs,
        seed=seed,
        progress=estimator.verbose > 0,
    )


def build_config(
    parts: FitParts, *, lr: float, head_init: str, wise_ft_alpha: float
) -> TrainingConfig:
    """Return the settings of the training that the parameters of an estimator define.

    Parameters
    ----------
    parts : FitParts
        The fit. `partial_fit` trains one epoch at a constant learning rate.
    lr, head_init, wise_ft_alpha
        The values of these parameters, which may be ``"auto"`` in the estimator.

    Returns
    -------
    TrainingConfig
    """
    estimator = parts.estimator
    max_epochs = parts.state.epoch + 1 if parts.partial else estimator.max_epochs
    execution = ExecutionConfig.from_estimator(estimator)
    warn_of_shared_gpu(execution.device)
    batch_size = execution.batch_size
    if estimator.batch_size == "auto" and not parts.partial:
        n_images = int((~parts.data.held_out).sum())
        batch_size = default_batch_size(n_images, max_epochs)
    return TrainingConfig(
        n_trainable_stages=count_trainable_stages(
            estimator.trainable, parts.model.stages, estimator.backbone
        ),
        head_init=head_init,
        # The linear probe is fitted on features with the pretrained statistics.
        freeze_batch_norm=head_init != RANDOM and estimator.weights is not None,
        optimizer=estimator.optimizer,
        lr=lr,
        layer_decay=estimator.layer_decay,
        weight_decay=estimator.weight_decay,
        lr_schedule="constant" if parts.partial else estimator.lr_schedule,
        max_epochs=max_epochs,
        wise_ft_alpha=wise_ft_alpha,
        unfreeze_every=estimator.unfreeze_every,
        patience=estimator.n_iter_no_change if estimator.early_stopping else None,
        scoring=estimator.scoring,
        batch_size=batch_size,
        evaluation_batch_size=execution.batch_size,
        device=execution.device,
        precision=execution.precision,
        verbose=estimator.verbose,
    )


def warn_of_shared_gpu(device: torch.device) -> None:
    """Warn if several worker processes of joblib train on the same GPU."""
    if device.type == "cpu" or not current_process().name.startswith("Loky"):
        return
    if torch.accelerator.device_count() == 1:
        warnings.warn(
            "Several worker processes share one GPU, which is slow and may run out of "
            "memory. Search with n_jobs=1, or give each worker a GPU of its own.",
            UserWarning,
            stacklevel=3,
        )


def default_batch_size(n_images: int, max_epochs: int) -> int:
    """Return the batch size of a training if it is ``"auto"``.

    Few images in large batches make few steps, which is too little training.

    Parameters
    ----------
    n_images : int
        Number of images in the training set.
    max_epochs : int
        Number of epochs.

    Returns
    -------
    int
        From 8 to 32: the largest with which the training has about 300 steps.
    """
    return int(np.clip(n_images * max_epochs // _N_STEPS, *_BATCH_SIZES))


def build_trainer(
    parts: FitParts, config: TrainingConfig, callbacks: Sequence[Any]
) -> Trainer:
    """Return the trainer of a model on all of its data.

    Parameters
    ----------
    parts : FitParts
        The fit.
    config : TrainingConfig
        Settings.
    callbacks : sequence of skorch callbacks
        Callbacks of the user, from `copy_callbacks`.

    Returns
    -------
    Trainer
    """
    model, data, sets = parts.model, parts.data, parts.sets
    valid = None
    if config.patience is not None:
        valid = sets.valid(np.flatnonzero(data.held_out))
    return Trainer(
        model.network,
        model.preprocessing,
        data.targets.target,
        sets.train(np.flatnonzero(~data.held_out)),
        valid,
        config=config,
        state=parts.state,
        callbacks=callbacks,
    )


def fit_head(
    model: InitialModel,
    targets: EncodedTargets,
    features: NDArray[np.float32],
    train: NDArray[np.bool_],
    seed: int,
) -> None:
    """Set the head of a model to a linear probe.

    Parameters
    ----------
    model : InitialModel
        The head of its network is overwritten.
    targets : EncodedTargets
        Targets and weights of all images.
    features : ndarray of shape (n, n_features), float32
        Input of the head for each image.
    train : ndarray of shape (n,), bool
        Mask of the images that the probe is fitted on.
    seed : int
        Seed of the probe.
    """
    weight = targets.sample_weight[train]
    targets.target.initialize_head(
        model.network[-1],
        features[train],
        targets.y[train],
        weight / weight.mean(),
        groups=None if targets.groups is None else targets.groups[train],
        hidden_layer_sizes=model.config.hidden_layer_sizes,
        seed=seed,
    )
