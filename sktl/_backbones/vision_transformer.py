"""Vision transformers of torchvision for images of more than one size.

torchvision builds a network for one size; for another one it has a function that
interpolates the positional embeddings in a state dict. The classes here apply it in
each forward pass, so that one network supports every multiple of its patch size.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import Encoder as FixedEncoder
from torchvision.models.vision_transformer import interpolate_embeddings

from sktl._backbones.unwrap import StateDict

_POSITIONS = "pos_embedding"  # (1, 1 + side * side, c): the class token, then patches
_MAX_SIDE = 128  # of the grid of patches in a file, whose header may be invalid


def support_other_sizes(network: nn.Module) -> nn.Module:
    """Return a network itself; a vision transformer then supports other image sizes.

    Parameters
    ----------
    network : Module
        A new network. At its own image size, and in its state dict, nothing changes. A
        subclass, whose forward method may differ, is not changed.
    """
    if type(network) is models.VisionTransformer and (
        type(network.encoder) is FixedEncoder
    ):
        # The builders of torchvision take no class.
        network.__class__ = VisionTransformer
        network.encoder.__class__ = Encoder
    return network


def patch_size(network: nn.Module) -> int | None:
    """Return of which number of pixels the side of an image must be a multiple.

    Parameters
    ----------
    network : Module
        Any network.

    Returns
    -------
    int or None
        None for a network that is not from `support_other_sizes`.
    """
    return network.patch_size if isinstance(network, VisionTransformer) else None


def adapt_positions(network: nn.Module, state_dict: StateDict) -> None:
    """Make positional embeddings of another image size loadable, in place.

    Parameters
    ----------
    network : Module
        Network from `support_other_sizes`, whose encoder then has the positional
        embeddings of the file; or any other network, for which nothing is changed.
    state_dict : dict of str to Tensor
        It is changed: the data type is that of the network.
    """
    name = f"encoder.{_POSITIONS}"
    if isinstance(network, VisionTransformer) and name in state_dict:
        own = network.encoder.pos_embedding
        if _has_other_grid(state_dict[name], own):
            state_dict[name] = state_dict[name].to(own.dtype)


class Encoder(FixedEncoder):
    """Positions, layers and norm: tokens ``(n, 1 + side * side, c)`` to tokens."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the tokens after the last norm."""
        x = input + _interpolate(self.pos_embedding, input.shape[1])
        encoded: Tensor = self.ln(self.layers(self.dropout(x)))
        return encoded

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        _resize_positions(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class VisionTransformer(models.VisionTransformer):
    """A vision transformer for square images, whose side is a multiple of the patch."""

    def _process_input(self, x: Tensor) -> Tensor:
        patches: Tensor = self.conv_proj(x)  # (n, 3, h, w) -> (n, c, side, side)
        return patches.flatten(2).transpose(1, 2)


class Embedding(nn.Module):
    """Patches, class token and positions: the start of a vision transformer.

    Parameters
    ----------
    network : torchvision.models.VisionTransformer
        Its modules and parameters are used, not copied.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.conv_proj = network.conv_proj
        self.class_token = network.class_token
        self.pos_embedding = network.encoder.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, 3, h, w)`` to tokens ``(n, 1 + patches, c)``."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)  # (n, patches, c)
        # Not len(x), which would be a constant in a traced network.
        class_tokens = self.class_token.expand(x.shape[0], -1, -1)
        tokens = torch.cat([class_tokens, patches], dim=1)
        return tokens + _interpolate(self.pos_embedding, tokens.shape[1])

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any
    ) -> None:
        _resize_positions(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _interpolate(positions: Tensor, n_tokens: int) -> Tensor:
    """Return positional embeddings for a number of tokens, as torchvision does."""
    if n_tokens == positions.shape[1]:
        return positions
    state = {f"encoder.{_POSITIONS}": positions}
    # Sides in patches, not in pixels.
    return interpolate_embeddings(math.isqrt(n_tokens - 1), 1, state)[
        f"encoder.{_POSITIONS}"
    ]


def _resize_positions(
    module: Any, state_dict: Mapping[str, Tensor], prefix: str
) -> None:
    """Give a module the number of positions that a state dict has for it."""
    given, own = state_dict.get(f"{prefix}{_POSITIONS}"), module.pos_embedding
    if given is not None and _has_other_grid(given, own):
        module.pos_embedding = nn.Parameter(
            own.new_empty(given.shape), requires_grad=own.requires_grad
        )


def _has_other_grid(given: Tensor, own: Tensor) -> bool:
    """Return whether tensors are positions of the same width for two image sizes."""
    if given.ndim != 3 or given.shape[::2] != own.shape[::2]:
        return False
    n_patches = given.shape[1] - 1
    side = math.isqrt(max(n_patches, 0))
    is_square = 0 < side <= _MAX_SIDE and side**2 == n_patches
    return is_square and given.shape != own.shape
