"""Assembly of a training from the parameters of an estimator and its data.

Modules below this one get typed settings, and never see the estimator.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._images.augmentation import augmentation_for
from sktl._images.augmented_views import AugmentedViews
from sktl._images.sequence import ImageSequence
from sktl._inference.execution import ExecutionConfig
from sktl._training.config import TrainerState, TrainingConfig
from sktl._training.datasets import (
    ActivationDataset,
    FixedViewDataset,
    ImageDataset,
    TrainingDataset,
)
from sktl._training.frozen_activations import FrozenActivations
from sktl._training.initial_model import FittedModel, InitialModel, ModelConfig
from sktl._training.network import count_trainable_stages
from sktl._training.targets import EncodedTargets, Target
from sktl._training.trainer import Trainer, warn_of_shared_gpu
from sktl._training.user_callbacks import copy_callbacks


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The data of a training.

    Attributes
    ----------
    images : ImageSequence
        Images whose weight is positive.
    targets : EncodedTargets
        Their targets and weights.
    held_out : ndarray of shape (n,), bool
        Mask of the validation set.
    """

    images: ImageSequence
    targets: EncodedTargets
    held_out: NDArray[np.bool_]


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


def build_frozen_activations(
    estimator: Any,
    model: InitialModel | FittedModel,
    images: ImageSequence | AugmentedViews,
    *,
    n_samples: int | None = None,
    use_memory: bool = True,
    read_only: bool = False,
    distribute: bool = True,
) -> FrozenActivations:
    """Return the activations at the end of the frozen prefix; none is computed yet.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    model : InitialModel or FittedModel
        The network and its preprocessing.
    images : ImageSequence or AugmentedViews
        All images that activations will be read of.
    n_samples : int, default=None
        Number of images of the whole call, of which `images` may be a part: it decides
        the shape of the batches, and so the bits. None: `images` are all.
    use_memory : bool, default=True
        Whether activations are cached in `memory`, if it is given.
    read_only : bool, default=False
        Whether cached activations are read, and none are written.
    distribute : bool, default=True
        Whether worker processes may compute them.

    Returns
    -------
    FrozenActivations
    """
    execution = ExecutionConfig.from_estimator(estimator)
    return FrozenActivations(
        model.network,
        images,
        model.preprocessing,
        execution.for_n_samples(n_samples or len(images)),
        pretrained=model.pretrained,
        prefix=model.prefix if isinstance(model, FittedModel) else None,
        memory=estimator.memory if use_memory else None,
        read_only=read_only,
        distribute=distribute,
    )


def build_trainer(
    estimator: Any,
    model: InitialModel,
    data: TrainingData,
    activations: FrozenActivations,
    state: TrainerState,
    *,
    single_epoch: bool = False,
) -> Trainer:
    """Return the trainer that the parameters of an estimator define.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    model : InitialModel
        The network.
    data : TrainingData
        Images and targets.
    activations : FrozenActivations
        Of all images of `data`, from `build_frozen_activations`.
    state : TrainerState
        State to start from.
    single_epoch : bool, default=False
        Whether to train for one epoch at a constant learning rate and keep its
        weights, as `partial_fit` does, instead of `max_epochs` epochs.

    Returns
    -------
    Trainer
    """
    execution = ExecutionConfig.from_estimator(estimator)
    warn_of_shared_gpu(execution.device)
    linear_probe = estimator.head_init == "linear_probe"
    early_stopping = estimator.early_stopping
    config = TrainingConfig(
        n_trainable_stages=count_trainable_stages(estimator.trainable, model.stages),
        # The linear probe is fitted on features with the pretrained statistics.
        freeze_batch_norm=linear_probe and estimator.weights is not None,
        optimizer=estimator.optimizer,
        lr=estimator.lr,
        layer_decay=estimator.layer_decay,
        weight_decay=estimator.weight_decay,
        lr_schedule="constant" if single_epoch else estimator.lr_schedule,
        max_epochs=state.epoch + 1 if single_epoch else estimator.max_epochs,
        label_smoothing=estimator.label_smoothing,
        wise_ft_alpha=1.0 if single_epoch else estimator.wise_ft_alpha,
        unfreeze_every=estimator.unfreeze_every,
        patience=estimator.n_iter_no_change if early_stopping else None,
        batch_size=estimator.batch_size,
        device=execution.device,
        precision=execution.precision,
        verbose=estimator.verbose,
    )
    train, valid = build_datasets(estimator, model, data, activations, state.seed)
    return Trainer(
        model.network,
        model.preprocessing,
        data.targets.target,
        train,
        valid if early_stopping else None,
        config=config,
        state=state,
        callbacks=copy_callbacks(estimator.callbacks),
    )


def build_datasets(
    estimator: Any,
    model: InitialModel,
    data: TrainingData,
    activations: FrozenActivations,
    seed: int,
) -> tuple[TrainingDataset, TrainingDataset]:
    """Return the training set and the validation set, which is never augmented."""
    if estimator.augmentation is None:
        train = _plain_dataset(estimator, model, data, activations, ~data.held_out)
        valid = _plain_dataset(estimator, model, data, activations, data.held_out)
        return train, valid
    # Activations of the validation set only: they are computed for all images given.
    rows = np.flatnonzero(data.held_out)
    images = data.images.subset(rows.tolist())
    apart = build_frozen_activations(
        estimator, model, images, n_samples=len(data.images)
    )
    valid = ActivationDataset(
        _image_dataset(estimator, model, data, rows, images, None), apart
    )
    if estimator.augmentation_views is None:
        return _augmented_dataset(estimator, model, data), valid
    return _fixed_view_dataset(estimator, model, data, seed), valid


def _plain_dataset(
    estimator: Any,
    model: InitialModel,
    data: TrainingData,
    activations: FrozenActivations,
    mask: NDArray[np.bool_],
) -> TrainingDataset:
    """Return images without augmentation: the frozen prefix sees each image once."""
    rows = np.flatnonzero(mask)
    images = _image_dataset(estimator, model, data, rows, data.images, None, rows)
    return ActivationDataset(images, activations)


def _augmented_dataset(
    estimator: Any, model: InitialModel, data: TrainingData
) -> TrainingDataset:
    """Return images that are augmented anew in each epoch: nothing can be cached."""
    rows, how = np.flatnonzero(~data.held_out), estimator.augmentation
    return _image_dataset(estimator, model, data, rows, data.images, how, rows)


def _fixed_view_dataset(
    estimator: Any, model: InitialModel, data: TrainingData, seed: int
) -> TrainingDataset:
    """Return fixed views of the images: the frozen prefix sees each view once."""
    rows = np.flatnonzero(~data.held_out)
    how = estimator.augmentation
    views = AugmentedViews(
        data.images.subset(rows.tolist()),
        how,
        model.preprocessing,
        n_views=estimator.augmentation_views,
        seed=seed,
    )
    # Without a seed, or with a function, no other fit has the same views.
    reproducible = isinstance(how, str) and isinstance(estimator.random_state, Integral)
    activations = build_frozen_activations(
        estimator, model, views, n_samples=len(data.images), use_memory=reproducible
    )
    dataset = FixedViewDataset(
        views,
        data.targets.y[rows],
        data.targets.sample_weight[rows],
        image_size=model.preprocessing.crop_size,
        n_jobs=estimator.n_jobs,
    )
    return ActivationDataset(dataset, activations)


def _image_dataset(
    estimator: Any,
    model: InitialModel,
    data: TrainingData,
    rows: NDArray[np.intp],
    images: ImageSequence,
    augmentation: Any,
    positions: NDArray[np.intp] | None = None,
) -> ImageDataset:
    """Return the dataset of some rows, which stand at `positions` of `images`."""
    return ImageDataset(
        images,
        np.arange(len(rows)) if positions is None else positions,
        data.targets.y[rows],
        data.targets.sample_weight[rows],
        augmentation=augmentation_for(augmentation, model.preprocessing),
        image_size=model.preprocessing.crop_size,
        n_jobs=estimator.n_jobs,
    )


def initialize_head(
    trainer: Trainer,
    model: InitialModel,
    data: TrainingData,
    activations: FrozenActivations,
) -> None:
    """Set the head to a linear probe on the training set, and record epoch 0.

    Parameters
    ----------
    trainer : Trainer
        Trainer of the model, not run yet.
    model : InitialModel
        The head of its network is overwritten.
    data : TrainingData
        Images and targets.
    activations : FrozenActivations
        Of all images of `data`.
    """
    features = activations.features()
    train, targets = ~data.held_out, data.targets
    weight = targets.sample_weight[train]
    targets.target.initialize_head(
        model.network[-1],
        features[train],
        targets.y[train],
        weight / weight.mean(),
        hidden_layer_sizes=model.config.hidden_layer_sizes,
        seed=trainer.state.seed,
    )
    trainer.record_initial_epoch(features, targets, data.held_out)
