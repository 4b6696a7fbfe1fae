"""Assembly of a training from the parameters of an estimator and its data.

Modules below this one get typed settings, and never see the estimator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._inference.execution import ExecutionConfig
from sktl._training.config import RANDOM, TrainerState, TrainingConfig
from sktl._training.initial_model import FittedModel, InitialModel, ModelConfig
from sktl._training.network import count_trainable_stages
from sktl._training.targets import EncodedTargets, Target
from sktl._training.trainer import Trainer, warn_of_shared_gpu
from sktl._training.training_sets import TrainingData, TrainingSets

_N_STEPS = 300  # of a training, if the batch size can be chosen
_BATCH_SIZES = (8, 32)


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
    estimator: Any,
    model: InitialModel,
    n_images: int,
    *,
    lr: float,
    head_init: str,
    wise_ft_alpha: float,
    max_epochs: int,
    single_epoch: bool = False,
) -> TrainingConfig:
    """Return the settings of the training that the parameters of an estimator define.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    model : InitialModel
        The network.
    n_images : int
        Number of images in the training set.
    lr, head_init, wise_ft_alpha
        The values of these parameters where they are ``"auto"``.
    max_epochs : int
        Number of epochs.
    single_epoch : bool, default=False
        Whether the last epoch is trained at a constant learning rate and its weights
        are kept, as by `partial_fit`.

    Returns
    -------
    TrainingConfig
    """
    execution = ExecutionConfig.from_estimator(estimator)
    warn_of_shared_gpu(execution.device)
    batch_size = execution.batch_size
    if estimator.batch_size == "auto" and not single_epoch:
        batch_size = default_batch_size(n_images, max_epochs)
    return TrainingConfig(
        n_trainable_stages=count_trainable_stages(
            estimator.trainable, model.stages, estimator.backbone
        ),
        head_init=head_init,
        # The linear probe is fitted on features with the pretrained statistics.
        freeze_batch_norm=head_init != RANDOM and estimator.weights is not None,
        optimizer=estimator.optimizer,
        lr=lr,
        layer_decay=estimator.layer_decay,
        weight_decay=estimator.weight_decay,
        lr_schedule="constant" if single_epoch else estimator.lr_schedule,
        max_epochs=max_epochs,
        label_smoothing=estimator.label_smoothing,
        wise_ft_alpha=wise_ft_alpha,
        unfreeze_every=estimator.unfreeze_every,
        patience=estimator.n_iter_no_change if estimator.early_stopping else None,
        batch_size=batch_size,
        evaluation_batch_size=execution.batch_size,
        device=execution.device,
        precision=execution.precision,
        verbose=estimator.verbose,
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
    model: InitialModel,
    data: TrainingData,
    sets: TrainingSets,
    config: TrainingConfig,
    state: TrainerState,
    callbacks: Sequence[Any],
) -> Trainer:
    """Return the trainer of a model on all of its data.

    Parameters
    ----------
    model : InitialModel
        The network.
    data : TrainingData
        Images and targets.
    sets : TrainingSets
        Of the same data.
    config : TrainingConfig
        Settings.
    state : TrainerState
        State to start from.
    callbacks : sequence of skorch callbacks
        Callbacks of the user, from `copy_callbacks`.

    Returns
    -------
    Trainer
    """
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
        state=state,
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
        hidden_layer_sizes=model.config.hidden_layer_sizes,
        seed=seed,
    )
