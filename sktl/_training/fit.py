"""One fit of an estimator, from validated data to the fitted model."""

import copy
from dataclasses import replace
from typing import Any

from skorch import NeuralNet

from sktl._images.sequence import ImageSequence
from sktl._training.build import build_trainer, fit_head, prepare_fit
from sktl._training.config import SOFT_PROBE, TrainingRecord
from sktl._training.fit_tasks import FitTasks
from sktl._training.initial_model import FittedModel
from sktl._training.network import soften_head
from sktl._training.settings import fit_settings
from sktl._training.targets import EncodedTargets
from sktl._training.trainer import Trainer
from sktl._training.user_callbacks import copy_callbacks


def fit_model(
    estimator: Any,
    images: ImageSequence,
    targets: EncodedTargets,
    fitted: FittedModel | None,
    *,
    partial: bool,
    previous_net: NeuralNet | None = None,
    tasks: FitTasks | None = None,
) -> tuple[FittedModel, TrainingRecord, NeuralNet]:
    """Train the network that the parameters of an estimator define.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read, and its history if it is fitted. It is not changed.
    images : ImageSequence
        All images.
    targets : EncodedTargets
        Targets of those whose weight is positive.
    fitted : FittedModel or None
        Model to continue with. None: start from the backbone.
    partial : bool
        Whether to train for one more epoch, as `partial_fit` does.
    previous_net : skorch.NeuralNet or None, default=None
        The net of the previous fit, whose optimizer has a state to continue with.
    tasks : FitTasks or None, default=None
        Calls the callbacks of scikit-learn.

    Returns
    -------
    fitted : FittedModel
        The trained model.
    record : TrainingRecord
        Its history and settings.
    net : skorch.NeuralNet
        The net that was trained.
    """
    parts = prepare_fit(estimator, images, targets, fitted, partial=partial)
    model, held_out, checkpoint = parts.model, parts.data.held_out, parts.checkpoint
    callbacks = copy_callbacks(estimator.callbacks)
    config = fit_settings(parts)
    trainer = build_trainer(parts, config, callbacks)
    if checkpoint is None or not checkpoint.resume(trainer):
        if parts.fits_probe:
            features = parts.activations.features()
            fit_head(model, targets, features, ~held_out, parts.state.seed)
            trainer.record_initial_epoch(features, targets, held_out)
            if config.head_init == SOFT_PROBE and config.max_epochs:
                soften_head(model.network[-1])
        elif parts.state.best_weights:
            trainer.score_best_weights()
        continues = partial or parts.state.epoch
        if continues and previous_net is not None:
            trainer.continue_optimizer(previous_net.optimizer_)

    def current() -> tuple[FittedModel, TrainingRecord]:
        """Return model and record as if the training had ended."""
        network = copy.deepcopy(trainer.network)
        weights = trainer.state.final_weights(
            network.state_dict(), config.wise_ft_alpha
        )
        network.load_state_dict(weights)
        now = replace(model, network=network).to_fitted(
            targets.target, trainer.n_frozen
        )
        return now, _record(trainer)

    def after_epoch(trainer: Trainer) -> bool:
        if checkpoint is not None:
            checkpoint.save(trainer)
        return tasks is not None and tasks.end_epoch(current)

    trainer.run(after_epoch, None if tasks is None else tasks.begin_epoch)
    fitted = model.to_fitted(targets.target, trainer.n_frozen)
    return fitted, _record(trainer), trainer.net


def _record(trainer: Trainer) -> TrainingRecord:
    state, config = trainer.state, trainer.config
    return TrainingRecord(
        list(state.history),
        state.best_epoch,
        config.lr,
        config.head_init,
        config.wise_ft_alpha,
        state.selection,
    )
