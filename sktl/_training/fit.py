"""One fit of an estimator, from validated data to the fitted model."""

from typing import Any

from skorch import NeuralNet

from sktl._images.sequence import ImageSequence
from sktl._training.build import build_trainer, fit_head, prepare_fit
from sktl._training.config import SOFT_PROBE, TrainingRecord
from sktl._training.initial_model import FittedModel
from sktl._training.network import soften_head
from sktl._training.settings import fit_settings
from sktl._training.targets import EncodedTargets
from sktl._training.user_callbacks import copy_callbacks


def fit_model(
    estimator: Any,
    images: ImageSequence,
    targets: EncodedTargets,
    fitted: FittedModel | None,
    *,
    partial: bool,
    previous_net: NeuralNet | None = None,
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
        elif (partial or parts.state.epoch) and previous_net is not None:
            trainer.continue_optimizer(previous_net.optimizer_)
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
