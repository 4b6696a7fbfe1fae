"""Replace the head of a backbone, as fine-tuned networks have it."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from sktl._backbones.backbone import Backbone
from sktl._backbones.feature_extractor import PENULTIMATE, layer_widths

NECK, HEAD = "neck", "head"
WHOLE_NETWORK = "network"  # the only part below the head, if there are no stages


def replace_head(
    backbone: Backbone,
    n_outputs: int,
    *,
    hidden_layer_sizes: Sequence[int] = (),
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return a copy of a pretrained network with a new head.

    Parameters
    ----------
    backbone : Backbone
        Backbone with stages, or one whose penultimate features are known without.
    n_outputs : int
        Number of outputs.
    hidden_layer_sizes : sequence of int, default=()
        Widths of the hidden layers of the head, each followed by a ReLU.
    dropout : float, default=0.0
        Dropout probability before each layer of the head. It replaces the dropout
        immediately before the old classification layer.

    Returns
    -------
    nn.Sequential
        The stages by name, or ``"network"`` if there are none; ``"neck"``, from the
        last stage to the penultimate features ``(n, n_features)``; and ``"head"``, from
        there to the outputs ``(n, n_outputs)``, initialized by torch. Every parameter
        requires a gradient.

    Raises
    ------
    ValueError
        If the backbone has no stages, if its weights lack more than the last linear
        layer, or if its head is not an nn.Sequential that contains that layer.
    """
    stages, neck, width = _parts_below_head(backbone)
    parts = OrderedDict(stages)
    parts[NECK] = nn.Sequential(*neck)
    parts[HEAD] = _new_head(width, n_outputs, hidden_layer_sizes, dropout)
    return nn.Sequential(parts).requires_grad_(True)


def _parts_below_head(
    backbone: Backbone,
) -> tuple[dict[str, nn.Module], list[nn.Module], int]:
    """Return copies of the stages and the blocks of the neck, and its width."""
    _check_weights(backbone)
    if backbone.neck is None:
        # One deepcopy of all three, so that shared modules stay shared.
        stages, head, last = copy.deepcopy(
            (backbone.stages, backbone.head, backbone.last_linear)
        )
        return stages, *_neck_before(last, head, backbone)
    (width,) = layer_widths(backbone, [PENULTIMATE], "avg", backbone.preprocessing)
    if backbone.reason_without_stages is not None:
        return {WHOLE_NETWORK: copy.deepcopy(backbone.neck)}, [], width
    stages, neck = copy.deepcopy((backbone.stages, backbone.neck))
    blocks = list(_flatten(neck))
    while blocks and isinstance(blocks[-1], nn.Dropout):
        del blocks[-1]
    return stages, blocks, width


def _check_weights(backbone: Backbone) -> None:
    """Raise if weights below the last linear layer are missing."""
    missing = backbone.missing_below_penultimate
    if missing:
        raise ValueError(
            "Fine-tuning requires weights of all layers below the last linear layer. "
            f"Those of {backbone.name!r} have no {', '.join(missing[:4])}. Use a stage "
            "with PretrainedFeatures, or other weights."
        )


def _neck_before(
    last: nn.Module, head: nn.Module, backbone: Backbone
) -> tuple[list[nn.Module], int]:
    """Return the blocks of a head before its last linear layer, and their width."""
    blocks = list(_flatten(head))
    if last not in blocks:
        raise ValueError(
            f"The head of {backbone.name!r} must be an nn.Sequential that contains its "
            f"last linear layer, to be replaced. Got {type(head).__name__} around "
            f"{backbone.penultimate!r}. Make it an nn.Sequential."
        )
    neck = blocks[: blocks.index(last)]
    while neck and isinstance(neck[-1], nn.Dropout):
        del neck[-1]
    if isinstance(last, nn.Conv2d):  # (n, c, h, w) -> (n, c)
        neck += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
        return neck, last.in_channels
    return neck, cast(nn.Linear, last).in_features


def stage_names(network: nn.Sequential) -> list[str]:
    """Return the names of the stages of a network from `replace_head`, in order."""
    return [name for name, _ in network.named_children()][:-2]


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of nested Sequentials in the order in which they run."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flatten(child)
    else:
        yield module


def _new_head(
    width: int, n_outputs: int, hidden_layer_sizes: Sequence[int], dropout: float
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for hidden in hidden_layer_sizes:
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    layers += [nn.Dropout(dropout)] if dropout else []
    layers.append(nn.Linear(width, n_outputs))
    return nn.Sequential(*layers)
