"""Which part of a network trains: a frozen prefix, stages that learn, and a new head.

Depth is counted in stages, so that ``2`` means the same in every architecture. Frozen
means frozen: neither the parameters nor the running statistics of BatchNorm move, and
no gradient is computed for what lies below.
"""

import copy
import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from sktl._backbones.backbone import Backbone
from sktl._utils.tensor_file import state_dict_digest

NECK, HEAD = "neck", "head"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def replace_head(
    backbone: Backbone,
    n_classes: int,
    *,
    hidden_layer_sizes: Sequence[int] = (),
    dropout: float = 0.0,
) -> nn.Sequential:
    """Put a new head on a copy of a pretrained network.

    Parameters
    ----------
    backbone : Backbone
        With stages.
    n_classes : int
        Number of outputs.
    hidden_layer_sizes : sequence of int, default=()
        Widths of the layers between the penultimate feature and the outputs, each
        followed by a ReLU.
    dropout : float, default=0.0
        Share of the values that is dropped before each layer of the new head. It
        replaces the dropout immediately before the old one.

    Returns
    -------
    nn.Sequential
        The stages by name; ``"neck"``, from the last stage to the penultimate feature
        ``(n, n_features)``; and ``"head"``, from there to the logits
        ``(n, n_classes)``, initialized by torch. Every parameter requires a gradient.

    Raises
    ------
    ValueError
        If the backbone has no stages, or its head is no row of modules in which its
        last linear layer stands.
    """
    # One call, so that what is shared before is shared after.
    stages, old_head, last = copy.deepcopy(
        (backbone.stages, backbone.head, backbone.last_linear)
    )
    blocks = list(_flat(old_head))
    if last not in blocks:
        raise ValueError(
            f"The head of {backbone.name!r} must be an nn.Sequential with its last "
            f"linear layer in it, to get a new one. Got {type(old_head).__name__} "
            f"around {backbone.penultimate!r}. Make it a Sequential."
        )
    neck = blocks[: blocks.index(last)]
    while neck and isinstance(neck[-1], nn.Dropout):
        del neck[-1]
    if isinstance(last, nn.Conv2d):  # its input is a map: the mean over all places
        neck += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
        width = last.in_channels
    else:
        width = cast(nn.Linear, last).in_features
    parts = OrderedDict(stages)
    parts[NECK] = nn.Sequential(*neck)
    parts[HEAD] = _new_head(width, n_classes, hidden_layer_sizes, dropout)
    return nn.Sequential(parts).requires_grad_(True)


def network_digest(network: nn.Sequential) -> str:
    """Give the sha256 of a network: of its weights, and of what is done with them."""
    # The weights alone do not tell a stride of 1 from one of 2.
    content = state_dict_digest(network.state_dict())
    return hashlib.sha256(f"{network} {content}".encode()).hexdigest()


def n_trainable_stages(trainable: str | int, stages: Sequence[str]) -> int:
    """Say how many of the highest stages train.

    Parameters
    ----------
    trainable : {"head", "all"}, int or str
        Only the head; all; the head and that many of the last stages; or the name of
        the lowest stage that trains.
    stages : sequence of str
        Names, the lowest first.

    Returns
    -------
    int
        From 0 to the number of stages.

    Raises
    ------
    ValueError
        If there is no such stage, or there are fewer.
    """
    if trainable == "head":
        return 0
    if trainable == "all":
        return len(stages)
    if isinstance(trainable, str):
        if trainable not in stages:
            close = difflib.get_close_matches(trainable, ["head", "all", *stages], n=1)
            raise ValueError(
                "The 'trainable' parameter must be 'head', 'all', a number of stages, "
                f"or one of the stages {', '.join(stages)}. Got {trainable!r} instead."
                f"{f' Do you mean {close[0]!r}?' if close else ''}"
            )
        return len(stages) - list(stages).index(trainable)
    if not 0 <= trainable <= len(stages):
        raise ValueError(
            f"The 'trainable' parameter must be from 0 to {len(stages)}, the number of "
            f"stages. Got {trainable!r} instead."
        )
    return int(trainable)


def n_frozen_parts(network: nn.Sequential, n_trainable: int) -> int:
    """Say how many parts of a network are frozen while some stages train.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`.
    n_trainable : int
        Number of stages, from above, that train with the head. The neck trains with
        the last stage.

    Returns
    -------
    int
        From 0 to all but the head.
    """
    n_stages = len(network) - 2
    return n_stages - n_trainable if n_trainable else n_stages + 1  # the neck too


class PartiallyFrozen(nn.Module):
    """A network of which only the upper part trains, for as long as it is in here.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`.
    n_trainable : int
        As in `n_frozen_parts`.
    precision : torch.dtype, default=torch.float32
        What is computed in; parameters stay float32.
    fixed_statistics : bool, default=False
        Whether BatchNorm normalizes by the statistics it came with where its stage
        trains, too.
    fused_prefix : callable, default=None
        Returns a faster module with the same output as the frozen prefix. Called when
        images come in after the frozen depth changed. None: the prefix itself.

    Attributes
    ----------
    n_frozen : int
        Number of parts that are frozen now.
    """

    def __init__(
        self,
        network: nn.Sequential,
        n_trainable: int,
        precision: torch.dtype = torch.float32,
        fixed_statistics: bool = False,
        fused_prefix: Callable[[nn.Sequential], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.fused_prefix = fused_prefix
        self.fixed_statistics = fixed_statistics
        self.network = network
        self.precision = precision
        self.unfreeze(n_trainable)

    def unfreeze(self, n_trainable: int) -> None:
        """Let the head and `n_trainable` stages train, and nothing else."""
        self.n_frozen = n_frozen_parts(self.network, n_trainable)
        for depth, part in enumerate(self.network):
            part.requires_grad_(depth >= self.n_frozen)
        self._trains = [(cast(nn.Module, self), True), *self._which_train()]
        self.train(self.training)
        self._frozen: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> Self:
        """Switch to training, all but what is frozen."""
        # skorch says it before every step, and the head alone steps in less time than
        # it takes to switch all modules: so it is seen first whether any is to switch.
        if all(module.training is (mode and on) for module, on in self._trains):
            return self
        super().train(mode)
        for part in self.network[: self.n_frozen]:
            part.eval()
        for module in self.network.modules():
            if self.fixed_statistics and isinstance(module, _BATCH_NORMS):
                module.eval()
        return self

    def _which_train(self) -> Iterator[tuple[nn.Module, bool]]:
        for depth, part in enumerate(self.network):
            for module in part.modules():
                fixed = self.fixed_statistics and isinstance(module, _BATCH_NORMS)
                yield module, depth >= self.n_frozen and not fixed

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits ``(n, n_classes)`` of ``(n, 3, h, w)``, float32."""
        if not self._frozen:  # made when it is needed: where activations come in, never
            frozen = self.network[: self.n_frozen]
            # In a tuple, or its parameters would be among those of this module.
            fused_prefix = (
                self.fused_prefix(frozen)
                if self.fused_prefix and len(frozen)
                else frozen
            )
            self._frozen = (fused_prefix,)
        with self._mixed(x), torch.no_grad():
            x = self._frozen[0](x)
        return self.forward_trainable(x)

    def forward_trainable(self, x: Tensor) -> Tensor:
        """Give the logits of what the frozen part gives."""
        with self._mixed(x):
            logits: Tensor = self.network[self.n_frozen :](x)
        return logits.float()

    def _mixed(self, x: Tensor) -> torch.autocast:
        mixed = self.precision != torch.float32
        return torch.autocast(x.device.type, self.precision, enabled=mixed)


def parameter_groups(
    network: nn.Sequential,
    n_trainable: int,
    *,
    lr: float,
    layer_decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Group the parameters of a network by depth, for an optimizer.

    Parameters
    ----------
    network : nn.Sequential
        From `replace_head`.
    n_trainable : int
        Number of stages that will ever train, as in `n_frozen_parts`. An optimizer asks
        for the gradient of each parameter in each step, so the others are left out.
    lr : float
        Learning rate of the head.
    layer_decay : float
        Each stage learns at this many times the rate of the one above it. This is
        what timm calls layer decay, after Clark et al., *ELECTRA*, 2020.
    weight_decay : float
        Of matrices and kernels. Biases and the parameters of normalizations have none.

    Returns
    -------
    list of dict
        For the head first, then downwards; empty groups are left out. The neck belongs
        to the last stage.
    """
    parts = dict(network.named_children())
    depths: list[list[nn.Module]] = [[parts.pop(HEAD)], [parts.pop(NECK)]]
    stages = list(parts.values())[::-1]
    depths[1].insert(0, stages[0])
    depths += [[stage] for stage in stages[1:]]
    groups = []
    for depth, modules in enumerate(depths[: 1 + n_trainable]):
        parameters = [p for module in modules for p in module.parameters()]
        rate = lr * layer_decay**depth
        for decay, chosen in (
            (weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """Give the modules of nested Sequentials in the order in which they run."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flat(child)
    else:
        yield module


def _new_head(
    width: int, n_classes: int, hidden_layer_sizes: Sequence[int], dropout: float
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for hidden in hidden_layer_sizes:
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    layers += [nn.Dropout(dropout)] if dropout else []
    layers.append(nn.Linear(width, n_classes))
    return nn.Sequential(*layers)
