"""Outputs of a fitted model."""

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sktl._images.sequence import ImageSequence
from sktl._inference.engines import get_compiled_model
from sktl._inference.execution import ExecutionConfig
from sktl._inference.forward import forward
from sktl._training.initial_model import FittedModel
from sktl._training.training_sets import build_frozen_activations


def predict_outputs(
    estimator: Any,
    fitted: FittedModel,
    images: ImageSequence,
    *,
    read_only: bool = False,
) -> NDArray[np.float32]:
    """Return the outputs of a fitted model for images.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read.
    fitted : FittedModel
        The network.
    images : ImageSequence
        Images.
    read_only : bool, default=False
        Whether cached activations are read, and none are written.

    Returns
    -------
    ndarray of shape (n_samples, n_outputs), float32

    Raises
    ------
    ValueError
        If an image cannot be read: names the row, the path and the reason.
    MemoryError
        If a batch does not fit into memory.
    """
    if fitted.prefix is not None and estimator.memory is not None:
        # In this process: another one may not have the file of the weights.
        activations = build_frozen_activations(
            estimator, fitted, images, read_only=read_only, distribute=False
        )
        return activations.outputs(fitted.prefix.n_parts)
    execution = ExecutionConfig.from_estimator(estimator).for_n_samples(len(images))
    model = get_compiled_model(
        ("fine-tuned", fitted.digest),
        lambda: copy.deepcopy(fitted.network),
        fitted.preprocessing,
        execution.for_network(fitted.network),
        name=f"the fine-tuned {fitted.architecture.backbone}",
    )
    return forward(model, images, fitted.preprocessing, execution)
