"""One fit of an estimator, from validated data to the fitted model."""

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from skorch import NeuralNet
from tqdm.auto import tqdm

from sktl._images.sequence import ImageSequence
from sktl._training.build import (
    build_config,
    build_initial_model,
    build_trainer,
    fit_head,
)
from sktl._training.checkpoint import Checkpoint, run_fingerprint
from sktl._training.config import (
    LINEAR_PROBE,
    RANDOM,
    SOFT_PROBE,
    SelectionRow,
    TrainerState,
    TrainingConfig,
    TrainingRecord,
)
from sktl._training.frozen_activations import FrozenActivations
from sktl._training.initial_model import FittedModel, InitialModel
from sktl._training.network import soften_head
from sktl._training.selection import (
    ALPHAS,
    SettingsSelection,
    candidates,
    choose,
    n_to_hold_out,
)
from sktl._training.targets import EncodedTargets, selection_mask, validation_mask
from sktl._training.training_sets import (
    TrainingData,
    TrainingSets,
    build_frozen_activations,
)
from sktl._training.user_callbacks import copy_callbacks

# Used where nothing can be selected: settings with which the training loss hardly ever
# rises above that of the linear probe.
_SAFE_LR, _SAFE_ALPHA = 1e-4, 0.4


def fit_model(
    estimator: Any,
    images: ImageSequence,
    targets: EncodedTargets,
    fitted: FittedModel | None,
    *,
    partial: bool,
) -> tuple[FittedModel, TrainingRecord, NeuralNet]:
    """Train the network that the parameters of an estimator define.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read, and if it is fitted and `partial`, its history and the
        state of its optimizer. It is not changed.
    images : ImageSequence
        All images.
    targets : EncodedTargets
        Targets of those whose weight is positive.
    fitted : FittedModel or None
        Model to continue with. None: start from the backbone.
    partial : bool
        Whether to train for one more epoch, as `partial_fit` does.

    Returns
    -------
    fitted : FittedModel
        The trained model.
    record : TrainingRecord
        Its history and settings.
    net : skorch.NeuralNet
        The net that was trained.
    """
    parts = _prepare(estimator, images, targets, fitted, partial=partial)
    model, data, activations = parts.model, parts.data, parts.activations
    checkpoint, config = parts.checkpoint, _settings(parts)
    callbacks = copy_callbacks(estimator.callbacks)
    trainer = build_trainer(model, data, parts.sets, config, parts.state, callbacks)
    if checkpoint is None or not checkpoint.resume(trainer):
        if parts.fits_probe:
            features = activations.features()
            fit_head(model, targets, features, ~data.held_out, parts.state.seed)
            trainer.record_initial_epoch(features, targets, data.held_out)
            if config.head_init == SOFT_PROBE and config.max_epochs:
                soften_head(model.network[-1])
        elif partial and hasattr(estimator, "net_"):  # not after unpickling
            trainer.continue_optimizer(estimator.net_.optimizer_)
    trainer.run(None if checkpoint is None else checkpoint.save)
    state = trainer.state
    record = TrainingRecord(
        state.history,
        state.best_epoch,
        config.lr,
        config.head_init,
        config.wise_ft_alpha,
        state.selection,
    )
    return model.to_fitted(targets.target, trainer.n_frozen), record, trainer.net


@dataclass(frozen=True, eq=False)
class _Parts:
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


def _prepare(
    estimator: Any,
    images: ImageSequence,
    targets: EncodedTargets,
    fitted: FittedModel | None,
    *,
    partial: bool,
) -> _Parts:
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
    if partial and not is_new:
        state = TrainerState(seed, estimator.n_iter_, list(estimator.history_))
    if checkpoint is not None:
        parameters = estimator.get_params(deep=False)
        fingerprint = run_fingerprint(parameters, images, targets, model.digest)
        state.selection = checkpoint.open(fingerprint)
    return _Parts(
        estimator, model, data, activations, sets, state, checkpoint, is_new, partial
    )


def _settings(parts: _Parts) -> TrainingConfig:
    """Return the settings of the training; select those that are "auto"."""
    estimator, held_out = parts.estimator, parts.data.held_out
    safe = _safe_settings(parts)
    is_auto = estimator.lr == "auto" or (
        estimator.wise_ft_alpha == "auto" and parts.interpolates
    )
    if not is_auto or parts.partial or not parts.is_new or safe.max_epochs == 0:
        return safe
    if not estimator.early_stopping:
        n_held_out = n_to_hold_out(len(held_out))
        mask = selection_mask(parts.data.targets, n_held_out, parts.state.seed)
        if mask is None:
            _warn_of_safe_settings(safe)
            return safe
        held_out = mask
    best = _select(parts, safe, held_out)
    if not best.n_epochs:  # nothing is trained, since nothing was better than the probe
        return replace(safe, wise_ft_alpha=0.0, max_epochs=0)
    return replace(
        safe, lr=best.lr, head_init=best.head_init, wise_ft_alpha=best.wise_ft_alpha
    )


def _safe_settings(parts: _Parts) -> TrainingConfig:
    """Return the settings of the training if nothing is selected."""
    estimator, partial = parts.estimator, parts.partial
    lr, alpha, head_init = estimator.lr, estimator.wise_ft_alpha, estimator.head_init
    if lr == "auto":
        lr = _SAFE_LR if parts.is_new else estimator.lr_
    if not parts.interpolates:
        alpha = 1.0
    return build_config(
        estimator,
        parts.model,
        int((~parts.data.held_out).sum()),
        lr=float(lr),
        head_init=LINEAR_PROBE if head_init == "auto" else head_init,
        wise_ft_alpha=_SAFE_ALPHA if alpha == "auto" else float(alpha),
        max_epochs=parts.state.epoch + 1 if partial else estimator.max_epochs,
        single_epoch=partial,
    )


def _select(
    parts: _Parts,
    config: TrainingConfig,
    held_out: NDArray[np.bool_],
) -> SelectionRow:
    """Return the best row of the selection, which `parts.state` has afterwards."""
    estimator, rows = parts.estimator, parts.state.selection
    selection = SettingsSelection(
        parts.model,
        parts.data,
        parts.sets,
        parts.activations,
        config,
        held_out=held_out,
        seed=parts.state.seed,
        fits_probe=parts.fits_probe,
    )
    alphas: tuple[float, ...] = ALPHAS
    if estimator.wise_ft_alpha != "auto" or not parts.interpolates:
        alphas = (config.wise_ft_alpha,)

    def save() -> None:
        if parts.checkpoint is not None:
            parts.checkpoint.save_selection(parts.state)

    lr = "auto" if estimator.lr == "auto" else config.lr
    tried = candidates(lr, estimator.head_init, config.batch_size)
    selection.run(tried, alphas, rows, save)
    if estimator.wise_ft_alpha == "auto" and parts.interpolates:
        if all(row.n_epochs for row in rows):  # not yet of an interrupted run
            rows.append(selection.evaluate_probe())
            save()
    chosen = choose(rows)
    if config.verbose:
        tqdm.write(
            f"Selected on held-out images: lr={chosen.lr}, head_init="
            f"{chosen.head_init!r}, wise_ft_alpha={chosen.wise_ft_alpha}.",
            file=sys.stderr,
        )
    return chosen


def _warn_of_safe_settings(config: TrainingConfig) -> None:
    warnings.warn(
        "lr='auto' and wise_ft_alpha='auto' are selected on held-out images, so each "
        "class must have at least two. Got a class with one image. "
        f"lr={config.lr} and wise_ft_alpha={config.wise_ft_alpha} are used. Add "
        "images, or set both parameters.",
        UserWarning,
        stacklevel=4,
    )
