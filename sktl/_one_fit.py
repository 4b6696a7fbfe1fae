"""Which training the parameters of an estimator and its data make."""

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sktl._activations import Activations, LabelledActivations
from sktl._augmentation import augmentation_for
from sktl._batches import LabelledBatches, LabelledPictures
from sktl._execution import Execution
from sktl._images import Pictures
from sktl._labels import Labelled
from sktl._linear_probe import solve_head
from sktl._preprocessing import Preprocessing
from sktl._start import Start
from sktl._trainable import n_open_stages
from sktl._training import Progress, Settings, Training, warn_of_shared_gpu


def start_of(estimator: Any, n_classes: int, seed: int) -> Start:
    """Put a new head on the backbone that an estimator asks for.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    n_classes, seed
        As `Start.of_backbone` has them.

    Returns
    -------
    Start
        With its backbone.
    """
    return Start.of_backbone(
        estimator.backbone,
        estimator.weights,
        n_classes,
        image_size=estimator.image_size,
        hidden_layer_sizes=estimator.hidden_layer_sizes,
        dropout=estimator.dropout,
        seed=seed,
        progress=estimator.verbose > 0,
    )


def activations_of(
    estimator: Any,
    network: nn.Sequential,
    pictures: Pictures,
    preprocessing: Preprocessing,
    digest: str | None,
) -> Activations:
    """Give what the frozen part of a network says of pictures.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    network, pictures, preprocessing, digest
        As `Activations` has them.

    Returns
    -------
    Activations
        None of which is computed yet.
    """
    return Activations(
        network,
        pictures,
        preprocessing,
        Execution.of(estimator),
        name=estimator.backbone,
        digest=digest,
        memory=estimator.memory,
        batch_size=estimator.batch_size,
        n_jobs=estimator.n_jobs,
        verbose=estimator.verbose,
    )


def training_of(
    estimator: Any,
    start: Start,
    pictures: Pictures,
    activations: Activations,
    given: Labelled,
    held_out: NDArray[np.bool_],
    progress: Progress,
    **instead: Any,
) -> Training:
    """Make the training that an estimator asks for.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    start : Start
        The network.
    pictures : Pictures
        Those that count.
    activations : Activations
        Of these, from `activations_of`.
    given : Labelled
        Their labels and weights.
    held_out : ndarray of shape (n_samples,), bool
        Which of them are not learned from.
    progress : Progress
        Where the training stands.
    **instead : dict
        Settings that are others than the parameters.

    Returns
    -------
    Training
        Not begun.
    """
    execution = Execution.of(estimator)
    warn_of_shared_gpu(execution.device)
    own = {name: getattr(estimator, name) for name in Settings.parameters()}
    probed = estimator.head_init == "linear_probe"
    settings = Settings(
        n_open_stages=n_open_stages(estimator.trainable, start.stages),
        # A head that was solved for these features would suffer from others.
        fixed_statistics=probed and estimator.weights is not None,
        patience=estimator.n_iter_no_change if estimator.early_stopping else None,
        device=execution.device,
        precision=execution.precision,
        **{**own, **instead},
    )

    def some(chosen: NDArray[np.bool_], augmentation: Any) -> LabelledBatches:
        labelled = LabelledPictures(
            pictures,
            np.flatnonzero(chosen),
            given.label[chosen],
            given.weight[chosen],
            augmentation=augmentation_for(augmentation, start.preprocessing),
            side=start.preprocessing.crop_size,
            n_jobs=estimator.n_jobs,
        )
        if estimator.augmentation is not None:
            return labelled
        return LabelledActivations(labelled, activations)

    return Training(
        start.network,
        start.preprocessing,
        some(~held_out, estimator.augmentation),
        some(held_out, None) if estimator.early_stopping else None,
        settings=settings,
        progress=progress,
        callbacks=copy.deepcopy(list(estimator.callbacks or ())),
    )


def solve_head_of(
    training: Training,
    start: Start,
    activations: Activations,
    given: Labelled,
    held_out: NDArray[np.bool_],
) -> None:
    """Make the head the model that is best on the frozen features: epoch 0.

    Parameters
    ----------
    training : Training
        Not begun; the head of its network is overwritten.
    start : Start
        Of the training.
    activations, given, held_out
        As `training_of` has them.
    """
    features = activations.features()
    learned = ~held_out
    weight = given.weight[learned]
    solve_head(
        start.network[-1],
        features[learned],
        given.label[learned],
        weight / weight.mean(),
        hidden_layer_sizes=start.built_as["hidden_layer_sizes"],
        seed=training.progress.seed,
    )
    training.begin(features, given.label, given.weight, held_out)
