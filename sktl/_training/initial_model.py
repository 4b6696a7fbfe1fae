"""The network that a training starts from, and the one that it ends with."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from sktl._backbones.new_head import replace_head, stage_names
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.saved_network import Architecture, saved_names
from sktl._backbones.source import HeadConfig
from sktl._images.preprocessing import Preprocessing
from sktl._training.network import network_digest, output_shape
from sktl._training.targets import Target
from sktl._utils.random_state import temporary_seed


@dataclass(frozen=True)
class ModelConfig:
    """The parameters of an estimator that define its network.

    Attributes
    ----------
    backbone, weights, image_size, resize, hidden_layer_sizes, dropout
        As in `FineTunedCNNClassifier`, in plain types: `weights` as str and
        `hidden_layer_sizes` as a tuple.
    """

    backbone: str
    weights: str
    image_size: int | None
    resize: str | None
    hidden_layer_sizes: tuple[int, ...]
    dropout: float

    @classmethod
    def from_estimator(cls, estimator: Any) -> Self:
        """Return the config of an estimator; raise a ValueError if it is invalid."""
        size, resize = estimator.image_size, estimator.resize
        return cls(
            estimator.backbone,
            str(estimator.weights),
            None if size is None else int(size),
            None if resize is None else str(resize),
            _hidden_layer_sizes(estimator.hidden_layer_sizes),
            float(estimator.dropout),
        )


@dataclass(frozen=True)
class PretrainedPrefix:
    """The parts of a network that still have the weights of its backbone.

    Attributes
    ----------
    n_parts : int
        Number of parts, counted from the input.
    backbone : BackboneSpec
        The backbone.
    """

    n_parts: int
    backbone: BackboneSpec


@dataclass(frozen=True)
class FrozenPrefix:
    """The parts of a network that were frozen at the end of a training.

    Attributes
    ----------
    n_parts : int
        Number of parts, counted from the input: the frozen depth.
    digest : str
        Digest of their weights, part of the cache key of activations.
    output_shape : tuple of int
        Shape of the activations of one image.
    """

    n_parts: int
    digest: str
    output_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FittedModel:
    """What a fit leaves behind, for predictions, warm starts and saving.

    Attributes
    ----------
    network : nn.Sequential
        The trained network, on the CPU, in evaluation mode. No other object holds it,
        and it never changes, so that `digest` stays its digest.
    preprocessing : Preprocessing
        Preprocessing of the images.
    target : Target
        Decodes the outputs.
    config : ModelConfig
        Parameters that define the network.
    architecture : Architecture
        How to build the network.
    saved_names : dict of str to str
        Name in a saved file of each tensor of the network.
    digest : str
        Digest of the network.
    pretrained : PretrainedPrefix
        The parts that have never been trained.
    prefix : FrozenPrefix or None
        The parts that were frozen at the end of the training. None if there are none,
        or if the weights come from a saved file.
    """

    network: nn.Sequential
    preprocessing: Preprocessing
    target: Target
    config: ModelConfig
    architecture: Architecture
    saved_names: dict[str, str]
    digest: str
    pretrained: PretrainedPrefix
    prefix: FrozenPrefix | None


@dataclass(eq=False)
class InitialModel:
    """A network to be trained.

    Attributes
    ----------
    network : nn.Sequential
        From `replace_head`. No other object holds it.
    preprocessing : Preprocessing
        Preprocessing of the images.
    config : ModelConfig
        Parameters that define the network.
    architecture : Architecture
        How to build the network.
    saved_names : dict of str to str
        Name in a saved file of each tensor of the network.
    digest : str
        Digest of the weights that the training starts from, without a new head.
    pretrained : PretrainedPrefix
        The parts that have the weights of the backbone.
    """

    network: nn.Sequential
    preprocessing: Preprocessing
    config: ModelConfig
    architecture: Architecture
    saved_names: dict[str, str]
    digest: str
    pretrained: PretrainedPrefix

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return stage_names(self.network)

    @classmethod
    def from_backbone(
        cls,
        config: ModelConfig,
        weights: str | os.PathLike[str] | None,
        n_outputs: int,
        *,
        seed: int,
        progress: bool,
    ) -> Self:
        """Return a backbone with a new head.

        Parameters
        ----------
        config : ModelConfig
            Parameters that define the network.
        weights, progress
            As in `load_backbone`.
        n_outputs : int
            Number of outputs.
        seed : int
            Seed of the new head, and of random weights.

        Returns
        -------
        InitialModel

        Raises
        ------
        ValueError, ConnectionError
            As `load_backbone` and `replace_head` do.
        """
        weights_seed = seed if weights is None else 0
        backbone = load_backbone(
            config.backbone, weights, random_state=weights_seed, progress=progress
        )
        _ = backbone.network  # loading may acquire the lock of the generators
        with temporary_seed(torch.device("cpu"), seed):
            network = replace_head(
                backbone,
                n_outputs,
                hidden_layer_sizes=config.hidden_layer_sizes,
                dropout=config.dropout,
            )
        spec = BackboneSpec.to(backbone, weights, weights_seed)
        head = HeadConfig(config.hidden_layer_sizes, config.dropout)
        return cls(
            network,
            backbone.preprocessing_at(config.image_size, config.resize),
            config,
            Architecture(backbone.name, (*backbone.definition.heads, head)),
            saved_names(backbone, network),
            backbone.digest,
            PretrainedPrefix(len(network) - 1, spec),
        )

    @classmethod
    def from_fitted(cls, fitted: FittedModel, config: ModelConfig) -> Self:
        """Return a copy of a fitted model, to continue its training.

        Parameters
        ----------
        fitted : FittedModel
            It is not changed.
        config : ModelConfig
            Of the parameters that the estimator has now.

        Returns
        -------
        InitialModel

        Raises
        ------
        ValueError
            If the parameters define another network.
        """
        changed = [
            field.name
            for field in fields(ModelConfig)
            if getattr(config, field.name) != getattr(fitted.config, field.name)
        ]
        if changed:
            raise ValueError(
                "warm_start and partial_fit continue with the fitted network, so the "
                "parameters that define it must not change. Got other values of "
                f"{', '.join(changed)}. Fit with warm_start=False."
            )
        return cls(
            copy.deepcopy(fitted.network),
            fitted.preprocessing,
            config,
            fitted.architecture,
            fitted.saved_names,
            fitted.digest,
            fitted.pretrained,
        )

    def to_fitted(self, target: Target, n_frozen: int) -> FittedModel:
        """Return the fitted model after the network has been trained.

        Parameters
        ----------
        target : Target
            Decodes the outputs.
        n_frozen : int
            Number of parts that are frozen at the end of the training.

        Returns
        -------
        FittedModel
            With a copy of the network.
        """
        network = copy.deepcopy(self.network.cpu()).eval().requires_grad_(True)
        backbone = self.pretrained.backbone
        pretrained = PretrainedPrefix(min(self.pretrained.n_parts, n_frozen), backbone)
        prefix = None
        if n_frozen:
            frozen = network[:n_frozen]
            prefix = FrozenPrefix(
                n_frozen,
                backbone.digest
                if n_frozen <= pretrained.n_parts
                else network_digest(frozen),
                output_shape(
                    frozen, self.preprocessing.crop_size, self.preprocessing.n_channels
                ),
            )
        return FittedModel(
            network,
            self.preprocessing,
            target,
            self.config,
            self.architecture,
            self.saved_names,
            network_digest(network),
            pretrained,
            prefix,
        )


def _hidden_layer_sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    widths: list[Any] = np.ravel(sizes).tolist() if np.size(sizes) else []
    if not all(type(width) is int and width >= 1 for width in widths):
        raise ValueError(
            "The 'hidden_layer_sizes' parameter must be positive ints, one for each "
            f"hidden layer. Got {sizes!r} instead."
        )
    return tuple(widths)
