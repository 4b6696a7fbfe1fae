"""Replace the head of a backbone, as fine-tuned networks have it."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from sktl._backbones.backbone import Backbone

NECK, HEAD = "neck", "head"


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
        Backbone with stages.
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
        The stages by name; ``"neck"``, from the last stage to the penultimate features
        ``(n, n_features)``; and ``"head"``, from there to the outputs
        ``(n, n_outputs)``, initialized by torch. Every parameter requires a gradient.

    Raises
    ------
    ValueError
        If the backbone has no stages, if its weights lack more than the last linear
        layer, or if its head is not an nn.Sequential that contains that layer.
    """
    own = f"{backbone.penultimate}."
    missing = [name for name in backbone.missing_head if not name.startswith(own)]
    if missing:
        raise ValueError(
            "Fine-tuning requires weights of all layers below the last linear layer. "
            f"Those of {backbone.name!r} have no {', '.join(missing[:4])}. Use a stage "
            "with PretrainedFeatures, or other weights."
        )
    # One deepcopy of all three, so that shared modules stay shared.
    stages, old_head, last = copy.deepcopy(
        (backbone.stages, backbone.head, backbone.last_linear)
    )
    blocks = list(_flatten(old_head))
    if last not in blocks:
        raise ValueError(
            f"The head of {backbone.name!r} must be an nn.Sequential that contains its "
            f"last linear layer, to be replaced. Got {type(old_head).__name__} around "
            f"{backbone.penultimate!r}. Make it an nn.Sequential."
        )
    neck = blocks[: blocks.index(last)]
    while neck and isinstance(neck[-1], nn.Dropout):
        del neck[-1]
    if isinstance(last, nn.Conv2d):  # (n, c, h, w) -> (n, c)
        neck += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
        width = last.in_channels
    else:
        width = cast(nn.Linear, last).in_features
    parts = OrderedDict(stages)
    parts[NECK] = nn.Sequential(*neck)
    parts[HEAD] = _new_head(width, n_outputs, hidden_layer_sizes, dropout)
    return nn.Sequential(parts).requires_grad_(True)


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
