"""The skorch net that runs the steps of a training."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from skorch import NeuralNet
from skorch.helper import predefined_split
from torch import nn

from sktl._training.config import TrainingConfig
from sktl._training.datasets import BatchLoader, TrainingDataset
from sktl._training.optim import make_optimizer
from sktl._training.targets import Target


def make_net(
    module: nn.Module,
    network: nn.Sequential,
    target: Target,
    config: TrainingConfig,
    valid: TrainingDataset | None,
    callbacks: Sequence[Any],
) -> NeuralNet:
    """Return an initialized net, which prints nothing.

    Parameters
    ----------
    module : nn.Module
        Computes the outputs for pixels or activations.
    network : nn.Sequential
        The network in `module`, whose parameters are trained.
    target : Target
        Defines the loss.
    config : TrainingConfig
        Settings.
    valid : TrainingDataset or None
        Validation set.
    callbacks : sequence of skorch callbacks
        Called in this order.

    Returns
    -------
    NeuralNet
    """
    return NeuralNet(
        module,
        target.loss(),
        optimizer=partial(
            make_optimizer,
            network,
            config.n_trainable_stages,
            config.optimizer,
            config.layer_decay,
            config.weight_decay,
            target.output_lr_factor,
        ),
        lr=config.lr,
        batch_size=config.batch_size,
        iterator_train=BatchLoader,
        iterator_train__shuffle=True,
        iterator_valid=BatchLoader,
        iterator_valid__batch_size=config.evaluation_batch_size,
        train_split=None if valid is None else predefined_split(valid),
        callbacks=[*callbacks],
        callbacks__print_log=None,
        device=config.device,
        verbose=0,
    ).initialize()
