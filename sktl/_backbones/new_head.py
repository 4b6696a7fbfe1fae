"""Replace the head of a backbone, as fine-tuned networks have it."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

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
        requires a gradient. Its attribute ``no_weight_decay`` has the names of the
        parameters to which the backbone applies no weight decay.

    Raises
    ------
    ValueError
        If the backbone has no stages, if its weights lack more than the last linear
        layer, or if its head is not an nn.Sequential that contains that layer.
    """
    _check_weights(backbone)
    below = parts_below_head(backbone)
    network = copy.deepcopy(below)
    network.no_weight_decay = _without_weight_decay(backbone, below)
    head = _new_head(_width(backbone), n_outputs, hidden_layer_sizes, dropout)
    network.add_module(HEAD, head)
    return network.requires_grad_(True)


def parts_below_head(backbone: Backbone) -> nn.Sequential:
    """Return what `replace_head` copies: the stages and the neck.

    Parameters
    ----------
    backbone : Backbone
        As in `replace_head`.

    Returns
    -------
    nn.Sequential
        With the modules and the parameters of the network itself.

    Raises
    ------
    ValueError
        As in `replace_head`.
    """
    neck: list[nn.Module] = []
    if backbone.neck is None:
        stages, neck = backbone.stages, _neck_before(backbone)
    elif backbone.reason_without_stages is not None:
        stages = {WHOLE_NETWORK: backbone.neck}
    else:
        stages, neck = backbone.stages, _without_dropout(_flatten(backbone.neck))
    return nn.Sequential(OrderedDict({**stages, NECK: nn.Sequential(*neck)}))


def _without_weight_decay(backbone: Backbone, below: nn.Module) -> Any:
    """Return the names in a module of parameters without weight decay."""
    patterns = backbone.structure.no_weight_decay
    excluded = {
        parameter
        for name, parameter in backbone.network.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return frozenset(
        name
        for name, parameter in below.named_parameters(remove_duplicate=False)
        if parameter in excluded
    )


def _check_weights(backbone: Backbone) -> None:
    """Raise if weights below the last linear layer are missing."""
    missing = backbone.missing_below_penultimate
    if missing:
        raise ValueError(
            "Fine-tuning requires weights of all layers below the last linear layer. "
            f"Those of {backbone.name!r} have no {', '.join(missing[:4])}. Use a stage "
            "with PretrainedFeatures, or other weights."
        )


def _neck_before(backbone: Backbone) -> list[nn.Module]:
    """Return the blocks of a head before its last linear layer."""
    head, last = backbone.head, backbone.last_linear
    blocks = list(_flatten(head))
    if last not in blocks:
        raise ValueError(
            f"The head of {backbone.name!r} must be an nn.Sequential that contains its "
            f"last linear layer, to be replaced. Got {type(head).__name__} around "
            f"{backbone.penultimate!r}. Make it an nn.Sequential."
        )
    neck = _without_dropout(blocks[: blocks.index(last)])
    if isinstance(last, nn.Conv2d):  # (n, c, h, w) -> (n, c)
        neck += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    return neck


def _without_dropout(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return blocks without the dropout at their end."""
    kept = list(blocks)
    while kept and isinstance(kept[-1], nn.Dropout):
        del kept[-1]
    return kept


def _width(backbone: Backbone) -> int:
    """Return the number of penultimate features."""
    if backbone.neck is None:
        last = backbone.last_linear
        if isinstance(last, nn.Conv2d):
            return last.in_channels
        return cast(nn.Linear, last).in_features
    (width,) = layer_widths(backbone, [PENULTIMATE], "avg", backbone.preprocessing)
    return width


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
