"""Interface between the registry and the sources of backbones.

A source is a library of networks, such as torchvision. It resolves a name and weights
to a `BackboneDefinition`, which describes its networks by a `NetworkStructure`. A new
source is one module with the functions of `BackboneSource`, and one entry in the list
of the registry.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Protocol

from torch import nn

from sktl._backbones.registration import Registration
from sktl._backbones.unwrap import SUFFIXES, StateDict
from sktl._images.preprocessing import Preprocessing

Label = str | int | float | bool


def _is_channels_first(layer: str) -> bool | None:
    return False


def _no_prefix_tokens(layer: str) -> int:
    return 0


def _keep_state_dict(network: nn.Module, state_dict: StateDict) -> StateDict:
    return state_dict


@dataclass(frozen=True, eq=False)
class NetworkStructure:
    """How a network is composed of modules.

    Attributes
    ----------
    trunk : sequence of Module
        Blocks in the order in which they run, to be grouped into stages by resolution.
    stages : mapping of str to Module or None
        The stages themselves, for a network that defines them.
    head : sequence of Module
        Blocks that run after the last stage.
    reason_not_staged : str or None
        Why the network cannot be split into stages, or None if it can be.
    neck : sequence of Module or None
        Blocks from the output of the last stage, or from the images if the network
        cannot be split, to the penultimate features. None: the blocks of the head
        before its last linear layer.
    trunk_channels_last : sequence of bool
        Whether the output of each block of the trunk is ``(n, h, w, c)``, not
        ``(n, c, h, w)`` or ``(n, tokens, c)``. Empty: of none.
    trunk_prefix_tokens : sequence of int
        Number of class and register tokens at the start of the output of each block of
        the trunk. Empty: of none.
    trunk_sides : sequence of float or None
        Side of the images, then of the output of each block of the trunk, in
        positions. None: to be measured.
    has_fixed_image_size : bool
        Whether the network supports only images of one size.
    side_multiple : int
        Number of pixels of which the side of an image must be a multiple.
    is_channels_last : callable
        Takes the name of a layer; returns whether its activations with four axes are
        ``(n, h, w, c)``, or None if that is not known and has to be measured. Raises a
        ValueError if they have another layout.
    n_prefix_tokens : callable
        Takes the name of a layer; returns the number of class and register tokens at
        the start of its activations ``(n, tokens, c)``.
    has_class_token : bool
        Whether the first of these tokens is the class token.
    pools_other_tokens : bool
        Whether the penultimate features are known not to be those of the class token.
    no_weight_decay : frozenset of str
        Names of parameters, with wildcards, to which no weight decay is applied besides
        biases and normalization, such as positional embeddings.
    saved_names : mapping of str to str or None
        Of a fine-tuned network: the name of each of its tensors in a saved file.
    """

    trunk: Sequence[nn.Module] = ()
    stages: Mapping[str, nn.Module] | None = None
    head: Sequence[nn.Module] = ()
    neck: Sequence[nn.Module] | None = None
    reason_not_staged: str | None = None
    trunk_channels_last: Sequence[bool] = ()
    trunk_prefix_tokens: Sequence[int] = ()
    trunk_sides: Sequence[float] | None = None
    has_fixed_image_size: bool = False
    side_multiple: int = 1
    is_channels_last: Callable[[str], bool | None] = _is_channels_first
    n_prefix_tokens: Callable[[str], int] = _no_prefix_tokens
    has_class_token: bool = True
    pools_other_tokens: bool = False
    no_weight_decay: frozenset[str] = frozenset()
    saved_names: Mapping[str, str] | None = None


@dataclass(frozen=True)
class HeadConfig:
    """A new head, from the penultimate features to the outputs.

    Attributes
    ----------
    hidden_layer_sizes : tuple of int
        Widths of the hidden layers.
    dropout : float
        Dropout probability before each layer.
    """

    hidden_layer_sizes: tuple[int, ...] = ()
    dropout: float = 0.0


@dataclass(frozen=True)
class BackboneDefinition:
    """Everything that is needed to create a backbone, apart from the weights.

    Attributes
    ----------
    build : callable
        Takes a number of categories, or None for the default, and returns a network.
    describe : callable
        Takes a network; returns its `NetworkStructure`.
    preprocessing : Preprocessing
        Transform the weights were trained with.
    categories : tuple of str or None
        Names of the outputs. Of a fine-tuned network, its class labels, which may be
        int, float or bool as well.
    min_size : int
        Minimum side of an image in pixels.
    has_fixed_image_size : bool or None
        As in `NetworkStructure`, for networks of any size or of one; None if only the
        structure of the network tells which sizes it supports.
    weights_name : str
        Name that the source gives to the weights, or to those whose preprocessing and
        categories are used.
    file : str or None
        Weights file; None for random weights.
    file_digest : str or None
        sha256 that the weights file must have, if the definition was read from it.
    registration : Registration or None
        Of a network from `register_backbone`: it is built with all its values, and may
        have any number of outputs.
    adapt_state_dict : callable
        Takes a network and a state dict; returns the state dict with the names of the
        parameters of the network.
    layout : {"NCHW", "NHWC"} or None
        Axes of activations for which they can be neither known nor measured.
    known_weights : tuple of str
        All names of weights that the source has for this network.
    license : str or None
        License of the weights, or None if the source states none.
    heads : tuple of HeadConfig
        Heads that replaced the original one, in the order of the fine-tunings.
    embedding_width : int or None
        Number of outputs of the weights, if these are an embedding of the image, not
        scores of categories.
    """

    build: Callable[[int | None], nn.Module]
    describe: Callable[[nn.Module], NetworkStructure]
    preprocessing: Preprocessing
    categories: tuple[Label, ...] | None
    min_size: int = 1
    has_fixed_image_size: bool | None = False
    weights_name: str = ""
    file: str | None = None
    file_digest: str | None = None
    registration: Registration | None = None
    adapt_state_dict: Callable[[nn.Module, StateDict], StateDict] = _keep_state_dict
    layout: str | None = None
    known_weights: tuple[str, ...] = ()
    license: str | None = None
    heads: tuple[HeadConfig, ...] = ()
    embedding_width: int | None = None

    @property
    def is_registered(self) -> bool:
        """Whether the network is from `register_backbone`."""
        return self.registration is not None


class BackboneSource(Protocol):
    """A source of backbones; a module with these functions is one."""

    def owns(self, name: str) -> bool:
        """Return whether a name belongs to this source, without importing a library."""

    def names(self, pretrained: bool = False) -> Collection[str]:
        """Return the names of the backbones of this source.

        Parameters
        ----------
        pretrained : bool, default=False
            Whether to return only those with pretrained weights; where a source has
            names of networks with the name of their weights, then these.
        """

    def resolve(
        self,
        name: str,
        weights: str | PathLike[str] | None,
        progress: bool,
        *,
        fetch: bool = True,
    ) -> BackboneDefinition:
        """Return the definition of a backbone; download its weights if needed.

        Parameters
        ----------
        name : str
            A name that the source owns.
        weights : str, path-like or None
            Name of weights, path of a file, or None for random weights.
        progress : bool
            Whether to show a progress bar of a download.
        fetch : bool, default=True
            Whether the values of the weights are needed. If not, nothing is
            downloaded, and the definition of weights with a name may have no file.

        Raises
        ------
        ConnectionError
            If the weights cannot be downloaded.
        ImportError
            If the library of the source is not installed.
        TypeError, ValueError
            If `name` or `weights` is invalid.
        """


def weights_path(
    name: str, weights: str | PathLike[str] | None, known: Iterable[str]
) -> str:
    """Return the path that the parameter `weights` specifies.

    Parameters
    ----------
    name : str
        Name of the backbone, for the error message.
    weights : str, path-like or None
        Value of the parameter.
    known : iterable of str
        Names of weights, for the error message.

    Raises
    ------
    TypeError
        If `weights` is neither a str nor path-like.
    ValueError
        If it is a str, but not a path.
    """
    if isinstance(weights, PathLike):
        return os.fspath(weights)
    if not isinstance(weights, str):
        raise TypeError(
            f"weights must be a str, a path or None. Got {weights!r} of type "
            f"{type(weights).__name__}."
        )
    if not is_path(weights):
        raise ValueError(
            f"The backbone {name!r} has the weights {', '.join(known)}; a path ends "
            f"in {', '.join(SUFFIXES)}. Got {weights!r}. Check the spelling, or pass "
            "the path of a file."
        )
    return weights


def is_path(weights: str) -> bool:
    """Return whether a value of the parameter `weights` is a path, not a name."""
    return weights.endswith(SUFFIXES) or os.path.basename(weights) != weights
