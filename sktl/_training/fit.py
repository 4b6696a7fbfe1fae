"""One fit of an estimator, from validated data to the fitted model."""

from typing import Any

from sklearn.utils import check_random_state

from sktl._images.sequence import ImageSequence
from sktl._training.build import (
    TrainingData,
    build_frozen_activations,
    build_initial_model,
    build_trainer,
    initialize_head,
)
from sktl._training.checkpoint import Checkpoint, checkpoint_seed, run_fingerprint
from sktl._training.config import TrainerState
from sktl._training.initial_model import FittedModel
from sktl._training.targets import EncodedTargets, validation_mask
from sktl._training.trainer import Trainer


def fit_model(
    estimator: Any,
    images: ImageSequence,
    targets: EncodedTargets,
    fitted: FittedModel | None,
    *,
    partial: bool,
) -> tuple[FittedModel, Trainer]:
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
    trainer : Trainer
        Holds the net and the history.
    """
    seed = int(check_random_state(estimator.random_state).randint(2**31 - 1))
    checkpoint_dir = None if partial else estimator.checkpoint
    if checkpoint_dir is not None:
        seed = checkpoint_seed(checkpoint_dir, default=seed)
    model = build_initial_model(estimator, targets.target, fitted, seed)
    min_size = model.preprocessing.min_decode_size(estimator.reducing_gap)
    images = images.subset(targets.rows.tolist()).with_min_decode_size(min_size)
    fraction = estimator.validation_fraction if estimator.early_stopping else None
    data = TrainingData(images, targets, validation_mask(targets, fraction, seed))
    activations = build_frozen_activations(estimator, model, images)
    state = TrainerState(seed)
    if partial and fitted is not None:
        state = TrainerState(seed, estimator.n_iter_, list(estimator.history_))
    trainer = build_trainer(
        estimator, model, data, activations, state, single_epoch=partial
    )
    checkpoint = None
    if checkpoint_dir is not None:
        parameters = estimator.get_params(deep=False)
        fingerprint = run_fingerprint(parameters, images, targets, model.digest)
        checkpoint = Checkpoint(checkpoint_dir, fingerprint)
    if checkpoint is None or not checkpoint.resume(trainer):
        linear_probe = estimator.head_init == "linear_probe"
        if fitted is None and linear_probe and targets.target.is_complete(targets.y):
            initialize_head(trainer, model, data, activations)
        elif partial and hasattr(estimator, "net_"):  # not after unpickling
            trainer.continue_optimizer(estimator.net_.optimizer_)
    trainer.run(None if checkpoint is None else checkpoint.save)
    return model.to_fitted(targets.target, trainer.n_frozen), trainer
