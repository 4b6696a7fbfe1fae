"""Which training the parameters of an estimator and its data make."""

import copy
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sktl._activations import Activations, LabelledActivations
from sktl._augmentation import Augmentation, augmentation_for
from sktl._backbones import Reference
from sktl._batches import LabelledBatches, LabelledPictures
from sktl._execution import Execution
from sktl._images import Pictures
from sktl._labels import Labelled
from sktl._linear_probe import solve_head
from sktl._preprocessing import Preprocessing
from sktl._start import Start
from sktl._trainable import n_open_stages
from sktl._training import Progress, Settings, Training, warn_of_shared_gpu
from sktl._views import AS_SEEN, Views


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
    pictures: Pictures | Views,
    preprocessing: Preprocessing,
    pretrained: tuple[int, Reference],
    *,
    remembered: bool = True,
    n_samples: int | None = None,
    spread: bool = True,
) -> Activations:
    """Give what the frozen part of a network says of pictures, or of views of them.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    network, pictures, preprocessing, pretrained, n_samples, spread
        As `Activations` has them.
    remembered : bool, default=True
        Whether `memory` is used, if there is one.

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
        pretrained=pretrained,
        memory=estimator.memory if remembered else None,
        batch_size=estimator.batch_size,
        n_jobs=estimator.n_jobs,
        verbose=estimator.verbose,
        n_samples=n_samples,
        spread=spread,
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

    learned, watched = _learned_and_watched(
        estimator, start, pictures, activations, given, held_out, progress.seed
    )
    return Training(
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
    start: Start,
    pictures: Pictures,
    activations: Activations,
    given: Labelled,
    held_out: NDArray[np.bool_],
    seed: int,
) -> tuple[LabelledBatches, LabelledBatches]:
    """Say what is trained on, and what the best epoch is told by.

    What is learned from varies: in each epoch anew, or as one of some fixed views, of
    which the frozen part sees each only once. What is held out does not vary.
    """
    varied, preprocessing = estimator.augmentation, start.preprocessing
    plain = augmentation_for(None, preprocessing)
    learned, watched = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def some(
        rows: NDArray[np.intp],
        seen: Pictures | Views,
        places: NDArray[np.intp],
        how: Augmentation = plain,
    ) -> LabelledPictures:
        return LabelledPictures(
            seen,
            places,
            given.label[rows],
            given.weight[rows],
            augmentation=how,
            side=preprocessing.crop_size,
            n_jobs=estimator.n_jobs,
        )

    def frozen(seen: Pictures | Views, **options: bool) -> Activations:
        # All in the batches of the whole: so the bits are those that others remember.
        return activations_of(
            estimator,
            start.network,
            seen,
            preprocessing,
            start.pretrained,
            n_samples=len(pictures),
            **options,
        )

    if varied is None:
        return (
            LabelledActivations(some(learned, pictures, learned), activations),
            LabelledActivations(some(watched, pictures, watched), activations),
        )
    # Only those that are asked for: what the frozen part says is computed for all.
    apart = pictures.at(watched.tolist())
    to_watch = some(watched, apart, np.arange(len(watched)))
    validation = LabelledActivations(to_watch, frozen(apart))
    if estimator.augmentation_views is None:
        how = augmentation_for(varied, preprocessing)
        return some(learned, pictures, learned, how), validation
    views = Views(
        pictures.at(learned.tolist()),
        varied,
        preprocessing,
        n_views=estimator.augmentation_views,
        seed=seed,
    )
    # Where no other fit can ask for the same, there is nothing to remember.
    repeats = isinstance(varied, str) and isinstance(estimator.random_state, Integral)
    to_learn = some(learned, views, np.arange(len(learned)), AS_SEEN)
    return LabelledActivations(to_learn, frozen(views, remembered=repeats)), validation


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
