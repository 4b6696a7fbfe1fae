"""Optimizers, parameter groups and the learning rate schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sktl._backbones.new_head import HEAD, NECK

LR_SCHEDULES = {"constant", "cosine", "onecycle"}
_WARM_UP = 0.1  # fraction of the steps


@dataclass(frozen=True)
class _Optimizer:
    """An optimizer of torch, and its state for each parameter."""

    create: Callable[..., torch.optim.Optimizer]
    state: tuple[str, ...]


OPTIMIZERS = {
    "adamw": _Optimizer(torch.optim.AdamW, ("step", "exp_avg", "exp_avg_sq")),
    "sgd": _Optimizer(
        partial(torch.optim.SGD, momentum=0.9, nesterov=True), ("momentum_buffer",)
    ),
}


def lr_lambda(lr_schedule: str, step: int, n_steps: int) -> float:
    """Return the factor of the learning rate in a step, counted from 0.

    Parameters
    ----------
    lr_schedule : {"constant", "cosine", "onecycle"}
        ``"constant"``: 1. ``"cosine"``: linear warm-up from 0 to 1 in the first tenth
        of the steps, then a cosine down to 0 (Loshchilov and Hutter, *SGDR*, 2017).
        ``"onecycle"``: a cosine from 1/25 up to 1 in the first three tenths, then a
        cosine down to 0 (Smith and Topin, *Super-Convergence*, 2018).
    step : int
        Number of the step.
    n_steps : int
        Number of steps of the training.

    Returns
    -------
    float
        From 0 to 1.
    """
    if lr_schedule == "constant":
        return 1.0
    if lr_schedule == "cosine":
        n_warm_up, initial = math.ceil(_WARM_UP * n_steps), 0.0
        progress = (step + 1) / (n_warm_up + 1)
    else:
        n_warm_up, initial = math.ceil(0.3 * n_steps), 1 / 25
        progress = (1 - math.cos(math.pi * step / n_warm_up)) / 2
    if step < n_warm_up:
        return initial + (1 - initial) * progress
    n_left = max(1, n_steps - n_warm_up)
    return (1 + math.cos(math.pi * (step - n_warm_up) / n_left)) / 2


def parameter_groups(
    network: nn.Sequential,
    n_trainable_stages: int,
    *,
    lr: float,
    layer_decay: float,
    weight_decay: float,
    output_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the parameters of a network by depth, with a learning rate for each.

    Parameters
    ----------
    network : nn.Sequential
        From `sktl._backbones.new_head.replace_head`.
    n_trainable_stages : int
        Number of stages that will ever be trained. The others have no group, since an
        optimizer reads the gradient of each of its parameters in each step.
    lr : float
        Learning rate of the head.
    layer_decay : float
        Ratio of the learning rate of a stage to that of the stage above it; layer decay
        of Clark et al., *ELECTRA*, 2020.
    weight_decay : float
        Weight decay; not applied to biases and normalization parameters, nor to the
        parameters in ``network.no_weight_decay``.
    output_lr_factor : float, default=1.0
        Factor of the learning rate of the last layer of the head.

    Returns
    -------
    list of dict
        From the head downwards, without empty groups. The neck belongs to the last
        stage, and a parameter of several stages to the last one of them. Without
        gradients, as while a stage is frozen, a parameter is not changed.
    """
    parts = dict(network.named_children())
    head, neck = parts.pop(HEAD), parts.pop(NECK)
    stages = list(parts.values())[::-1]
    depths = [[head], [stages[0], neck], *([stage] for stage in stages[1:])]
    rates = [([cast(nn.Sequential, head)[-1]], lr * output_lr_factor)]
    for depth, modules in enumerate(depths[: 1 + n_trainable_stages]):
        rates.append((modules, lr * layer_decay**depth))
    names = cast(Any, network).no_weight_decay
    excluded = {network.get_parameter(name) for name in names}
    groups = []
    grouped: set[nn.Parameter] = set()  # an optimizer refuses a parameter given twice
    for modules, rate in rates:
        own = dict.fromkeys(p for module in modules for p in module.parameters())
        parameters = [p for p in own if p not in grouped]
        grouped.update(parameters)
        for decay, chosen in (
            (weight_decay, [p for p in parameters if p.ndim > 1 and p not in excluded]),
            (0.0, [p for p in parameters if p.ndim <= 1 or p in excluded]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


def make_optimizer(
    network: nn.Sequential,
    n_trainable_stages: int,
    optimizer: str,
    layer_decay: float,
    weight_decay: float,
    output_lr_factor: float,
    parameters: Any,
    lr: float,
) -> torch.optim.Optimizer:
    """Make an optimizer, with the arguments that skorch passes to one.

    Parameters
    ----------
    network, n_trainable_stages, layer_decay, weight_decay, output_lr_factor, lr
        As in `parameter_groups`.
    optimizer : {"adamw", "sgd"}
        Name of the optimizer.
    parameters : list
        The one group of all parameters that skorch passes; not used.

    Returns
    -------
    torch.optim.Optimizer
        Each group has its learning rate as ``"max_lr"`` too.
    """
    groups = parameter_groups(
        network,
        n_trainable_stages,
        lr=lr,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        output_lr_factor=output_lr_factor,
    )
    for group in groups:
        group["max_lr"] = group["lr"]
    return OPTIMIZERS[optimizer].create(groups)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    name: str,
    state: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Load the state of an optimizer for the same parameters.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        From `make_optimizer`; it is changed.
    name : {"adamw", "sgd"}
        Name of the optimizer.
    state : mapping
        The ``"state"`` of its state dict.

    Raises
    ------
    ValueError
        If the state belongs to another optimizer or to other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loaded: dict[int, dict[str, Tensor]] = {}
    for number, values in state.items():
        if not 0 <= number < len(parameters):
            raise ValueError(f"its optimizer has a parameter {number} too many")
        parameter = parameters[number]
        expected = {
            key: () if key == "step" else parameter.shape
            for key in OPTIMIZERS[name].state
        }
        if {key: value.shape for key, value in values.items()} != expected or not all(
            value.is_floating_point() for value in values.values()
        ):
            raise ValueError(f"the state of parameter {number} is of another optimizer")
        # In the memory layout of the parameter, as it was: sums in another order may
        # round differently.
        loaded[number] = {
            key: torch.empty_like(parameter).copy_(value)
            if value.shape == parameter.shape
            else value.clone()
            for key, value in values.items()
        }
    optimizer.load_state_dict({"state": loaded, "param_groups": groups})
