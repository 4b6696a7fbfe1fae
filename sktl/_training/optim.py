"""What a step of training is: the loss, the optimizer, and how fast it goes."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sktl._training.network import parameter_groups

LR_SCHEDULES = {"constant", "cosine", "onecycle"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
# What each of them remembers of a parameter.
_STATE: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
_WARM_UP = 0.1  # of all steps


class WeightedCrossEntropy(nn.Module):
    """Mean of the cross entropies of a batch, each times the weight of its image.

    Parameters
    ----------
    label_smoothing : float
        Share of the target that is spread evenly over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        """Give the loss of ``(n, n_classes)`` for labels and weights ``(n,)`` each."""
        label, weight = target
        losses = F.cross_entropy(
            logits, label, reduction="none", label_smoothing=self.label_smoothing
        )
        return (losses * weight).mean()


def lr_lambda(lr_schedule: str, step: int, n_steps: int) -> float:
    """Say what the learning rate is multiplied with in a step, counted from 0.

    ``"constant"``: 1. ``"cosine"``: from 0 up to 1 in the first tenth of the steps,
    then along a cosine down to 0 (Loshchilov and Hutter, *SGDR*, 2017).
    ``"onecycle"``: from 1/25 up to 1 in the first three tenths and down to 0, both
    along cosines (Smith and Topin, *Super-Convergence*, 2018).
    """
    if lr_schedule == "constant":
        return 1.0
    if lr_schedule == "cosine":
        n_up, start = math.ceil(_WARM_UP * n_steps), 0.0
        up = (step + 1) / (n_up + 1)
    else:
        n_up, start = math.ceil(0.3 * n_steps), 1 / 25
        up = (1 - math.cos(math.pi * step / n_up)) / 2
    if step < n_up:
        return start + (1 - start) * up
    return (1 + math.cos(math.pi * (step - n_up) / max(1, n_steps - n_up))) / 2


def make_optimizer(
    network: nn.Sequential,
    n_trainable: int,
    optimizer: str,
    layer_decay: float,
    weight_decay: float,
    parameters: Any,
    lr: float,
) -> torch.optim.Optimizer:
    """Make an optimizer, in skorch's way of asking for one.

    Parameters
    ----------
    network : nn.Sequential
        From `sktl._training.network.replace_head`.
    optimizer : {"adamw", "sgd"}
        Which.
    n_trainable, layer_decay, weight_decay, lr
        As `parameter_groups` has them.
    parameters : list
        The one group that skorch would have; instead of it there is one for each depth.

    Returns
    -------
    torch.optim.Optimizer
        Each of its groups has its rate as ``"highest_lr"`` too.
    """
    groups = parameter_groups(
        network, n_trainable, lr=lr, layer_decay=layer_decay, weight_decay=weight_decay
    )
    for group in groups:
        group["highest_lr"] = group["lr"]
    return OPTIMIZERS[optimizer](groups)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Give an optimizer the state that one for the same parameters had.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        It is changed.
    state : mapping
        The ``"state"`` of its state dict.

    Raises
    ------
    ValueError
        If it is that of an optimizer of another kind, or for other parameters.
    """
    names = _STATE[type(optimizer)]
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    laid_out: dict[int, dict[str, Tensor]] = {}
    for number, values in state.items():
        like = parameters[number]
        shapes = {name: () if name == "step" else like.shape for name in names}
        if {name: value.shape for name, value in values.items()} != shapes or not all(
            value.is_floating_point() for value in values.values()
        ):
            raise ValueError(f"the state of parameter {number} is of another optimizer")
        # In the memory layout of the parameter, as it was: a sum in another order may
        # round differently.
        laid_out[number] = {
            name: torch.empty_like(like).copy_(value)
            if value.shape == like.shape
            else value.clone()
            for name, value in values.items()
        }
    optimizer.load_state_dict({"state": laid_out, "param_groups": groups})
