"""Which training the parameters of an estimator and its data make."""

import copy
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sktl._backbones.registry import BackboneSpec
from sktl._images.augmentation import Augmentation, augmentation_for
from sktl._images.augmented_views import APPLY_VIEW, AugmentedViews
from sktl._images.preprocessing import Preprocessing
from sktl._images.sequence import ImageSequence
from sktl._inference.execution import ExecutionConfig
from sktl._training.datasets import ImageDataset, TrainingDataset
from sktl._training.frozen_activations import ActivationDataset, FrozenActivations
from sktl._training.initial_model import InitialModel
from sktl._training.linear_probe import fit_linear_probe
from sktl._training.network import n_trainable_stages
from sktl._training.targets import EncodedTargets
from sktl._training.trainer import (
    Trainer,
    TrainerState,
    TrainingConfig,
    warn_of_shared_gpu,
)


def build_initial_model(estimator: Any, n_classes: int, seed: int) -> InitialModel:
    """Put a new head on the backbone that an estimator asks for.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    n_classes, seed
        As `InitialModel.from_backbone` has them.

    Returns
    -------
    InitialModel
        With its backbone.
    """
    return InitialModel.from_backbone(
        estimator.backbone,
        estimator.weights,
        n_classes,
        image_size=estimator.image_size,
        hidden_layer_sizes=estimator.hidden_layer_sizes,
        dropout=estimator.dropout,
        seed=seed,
        progress=estimator.verbose > 0,
    )


def build_frozen_activations(
    estimator: Any,
    network: nn.Sequential,
    images: ImageSequence | AugmentedViews,
    preprocessing: Preprocessing,
    pretrained: tuple[int, BackboneSpec],
    *,
    remembered: bool = True,
    n_samples: int | None = None,
    spread: bool = True,
) -> FrozenActivations:
    """Give what the frozen part of a network says of images, or of views of them.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    network, images, preprocessing, pretrained, spread
        As `FrozenActivations` has them.
    n_samples : int, default=None
        As `ExecutionConfig.for_n_samples`; by default the number of `images`.
    remembered : bool, default=True
        Whether `memory` is used, if there is one.

    Returns
    -------
    FrozenActivations
        None of which is computed yet.
    """
    execution = ExecutionConfig.from_estimator(estimator)
    return FrozenActivations(
        network,
        images,
        preprocessing,
        execution.for_n_samples(n_samples or len(images)),
        pretrained=pretrained,
        memory=estimator.memory if remembered else None,
        spread=spread,
    )


def build_trainer(
    estimator: Any,
    start: InitialModel,
    images: ImageSequence,
    activations: FrozenActivations,
    given: EncodedTargets,
    held_out: NDArray[np.bool_],
    progress: TrainerState,
    **instead: Any,
) -> Trainer:
    """Make the training that an estimator asks for.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    start : InitialModel
        The network.
    images : ImageSequence
        Those that count.
    activations : FrozenActivations
        Of these, from `build_frozen_activations`.
    given : EncodedTargets
        Their labels and weights.
    held_out : ndarray of shape (n_samples,), bool
        Which of them are not learned from.
    progress : TrainerState
        Where the training stands.
    **instead : dict
        Settings that are others than the parameters.

    Returns
    -------
    Trainer
        Not begun.
    """
    execution = ExecutionConfig.from_estimator(estimator)
    warn_of_shared_gpu(execution.device)
    own = {name: getattr(estimator, name) for name in TrainingConfig.parameters()}
    probed = estimator.head_init == "linear_probe"
    settings = TrainingConfig(
        n_trainable_stages=n_trainable_stages(estimator.trainable, start.stages),
        # A head that was solved for these features would suffer from others.
        fixed_statistics=probed and estimator.weights is not None,
        patience=estimator.n_iter_no_change if estimator.early_stopping else None,
        device=execution.device,
        precision=execution.precision,
        **{**own, **instead},
    )

    learned, watched = _learned_and_watched(
        estimator, start, images, activations, given, held_out, progress.seed
    )
    return Trainer(
        start.network,
        start.preprocessing,
        learned,
        watched if estimator.early_stopping else None,
        settings=settings,
        progress=progress,
        callbacks=copy.deepcopy(list(estimator.callbacks or ())),
    )


def _learned_and_watched(
    estimator: Any,
    start: InitialModel,
    images: ImageSequence,
    activations: FrozenActivations,
    given: EncodedTargets,
    held_out: NDArray[np.bool_],
    seed: int,
) -> tuple[TrainingDataset, TrainingDataset]:
    """Say what is trained on, and what the best epoch is told by.

    What is learned from varies: in each epoch anew, or as one of some fixed views, of
    which the frozen part sees each only once. What is held out does not vary.
    """
    varied, preprocessing = estimator.augmentation, start.preprocessing
    plain = augmentation_for(None, preprocessing)
    learned, watched = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def some(
        rows: NDArray[np.intp],
        seen: ImageSequence | AugmentedViews,
        places: NDArray[np.intp],
        how: Augmentation = plain,
    ) -> ImageDataset:
        return ImageDataset(
            seen,
            places,
            given.label[rows],
            given.weight[rows],
            augmentation=how,
            side=preprocessing.crop_size,
            n_jobs=estimator.n_jobs,
        )

    def frozen(
        seen: ImageSequence | AugmentedViews, **options: bool
    ) -> FrozenActivations:
        # All in the batches of the whole: so the bits are those that others remember.
        return build_frozen_activations(
            estimator,
            start.network,
            seen,
            preprocessing,
            start.pretrained,
            n_samples=len(images),
            **options,
        )

    if varied is None:
        return (
            ActivationDataset(some(learned, images, learned), activations),
            ActivationDataset(some(watched, images, watched), activations),
        )
    # Only those that are asked for: what the frozen part says is computed for all.
    apart = images.subset(watched.tolist())
    to_watch = some(watched, apart, np.arange(len(watched)))
    validation = ActivationDataset(to_watch, frozen(apart))
    if estimator.augmentation_views is None:
        how = augmentation_for(varied, preprocessing)
        return some(learned, images, learned, how), validation
    views = AugmentedViews(
        images.subset(learned.tolist()),
        varied,
        preprocessing,
        n_views=estimator.augmentation_views,
        seed=seed,
    )
    # Where no other fit can ask for the same, there is nothing to remember.
    repeats = isinstance(varied, str) and isinstance(estimator.random_state, Integral)
    to_learn = some(learned, views, np.arange(len(learned)), APPLY_VIEW)
    return ActivationDataset(to_learn, frozen(views, remembered=repeats)), validation


def initialize_head(
    training: Trainer,
    start: InitialModel,
    activations: FrozenActivations,
    given: EncodedTargets,
    held_out: NDArray[np.bool_],
) -> None:
    """Make the head the model that is best on the frozen features: epoch 0.

    Parameters
    ----------
    training : Trainer
        Not begun; the head of its network is overwritten.
    start : InitialModel
        Of the training.
    activations, given, held_out
        As `build_trainer` has them.
    """
    features = activations.features()
    learned = ~held_out
    weight = given.weight[learned]
    fit_linear_probe(
        start.network[-1],
        features[learned],
        given.label[learned],
        weight / weight.mean(),
        hidden_layer_sizes=start.model_config["hidden_layer_sizes"],
        seed=training.progress.seed,
    )
    training.begin(features, given.label, given.weight, held_out)
