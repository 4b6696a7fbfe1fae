"""Where a training starts: a network with its head, and all that belongs to it."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._images.preprocessing import Preprocessing
from sktl._training.network import replace_head
from sktl._utils.random_state import temporary_seed


@dataclass(eq=False)
class InitialModel:
    """A network to be trained.

    Attributes
    ----------
    network : nn.Sequential
        From `replace_head`; nobody else holds it.
    preprocessing : Preprocessing
        What images go through before.
    model_config : dict
        What `replace_head` was asked for, of values that JSON can hold.
    digest : str
        Of the weights it starts from, without the new head.
    pretrained : (int, BackboneSpec)
        As `FrozenActivations` has it.
    """

    network: nn.Sequential
    preprocessing: Preprocessing
    model_config: dict[str, Any]
    digest: str
    pretrained: tuple[int, BackboneSpec]

    @property
    def stages(self) -> list[str]:
        """Names of the stages, the lowest first."""
        return [name for name, _ in self.network.named_children()][:-2]

    @classmethod
    def from_backbone(
        cls,
        name: str,
        weights: str | os.PathLike[str] | None,
        n_classes: int,
        *,
        image_size: int | None,
        hidden_layer_sizes: int | Sequence[int],
        dropout: float,
        seed: int,
        progress: bool,
    ) -> Self:
        """Put a new head on a backbone.

        Parameters
        ----------
        name, weights, progress
            As `load_backbone` has them.
        n_classes, hidden_layer_sizes, dropout
            As `replace_head` has them.
        image_size : int or None
            As `Backbone.preprocessing_at` has it.
        seed : int
            Of the new head, and of random weights.

        Returns
        -------
        InitialModel
            At the weights of the backbone.

        Raises
        ------
        ValueError, ConnectionError
            As these functions do.
        """
        seed_of_weights = seed if weights is None else 0
        backbone = load_backbone(
            name, weights, random_state=seed_of_weights, progress=progress
        )
        model_config: dict[str, Any] = {
            "hidden_layer_sizes": _widths(hidden_layer_sizes),
            "dropout": float(dropout),
        }
        with temporary_seed(torch.device("cpu"), seed):
            network = replace_head(backbone, n_classes, **model_config)
        return cls(
            network,
            backbone.preprocessing_at(image_size),
            {
                "backbone": name,
                "weights": str(weights),
                "image_size": None if image_size is None else int(image_size),
                **model_config,
            },
            backbone.digest,
            (len(network) - 1, BackboneSpec.to(backbone, weights, seed_of_weights)),
        )

    @classmethod
    def from_fitted(cls, estimator: Any) -> Self:
        """Go on from a fitted FineTunedCNNClassifier.

        Parameters
        ----------
        estimator : FineTunedCNNClassifier
            Fitted. It keeps its network; a copy is trained.

        Returns
        -------
        InitialModel
            At the weights that the estimator has.

        Raises
        ------
        ValueError
            If its parameters ask for another network than it has.
        """
        model_config = estimator._model_config
        asked = {
            "backbone": estimator.backbone,
            "weights": str(estimator.weights),
            "image_size": estimator.image_size,
            "hidden_layer_sizes": _widths(estimator.hidden_layer_sizes),
            "dropout": estimator.dropout,
        }
        other = [name for name, value in asked.items() if value != model_config[name]]
        if other:
            raise ValueError(
                "warm_start and partial_fit go on with the network there is, so its "
                f"parameters must be those it was made with. Got other values of "
                f"{', '.join(other)}. Fit with warm_start=False."
            )
        return cls(
            copy.deepcopy(estimator.module_),
            estimator.preprocessing_,
            model_config,
            estimator._digest,
            estimator._pretrained,
        )


def _widths(hidden_layer_sizes: int | Sequence[int]) -> list[int]:
    given = hidden_layer_sizes
    widths: list[Any] = np.ravel(given).tolist() if np.size(given) else []
    if not all(type(width) is int and width >= 1 for width in widths):
        raise ValueError(
            "The 'hidden_layer_sizes' parameter must be positive ints, one for each "
            f"hidden layer. Got {given!r} instead."
        )
    return widths
