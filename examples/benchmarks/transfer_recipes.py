"""
============================================
Recipes of fastai and AutoGluon in torch
============================================

Used by ``transfer_quality.py``, with the training loop of ``transfer_scripts.py``:

- the recipe of fastai's ``fine_tune``, and fastai itself, if it is installed;
- the published recipe of AutoGluon.

Where a recipe differs from its original, its docstring says so.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader
from torchvision import transforms as T
from transfer_scripts import Task, accuracy, train_epoch

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def decay_groups(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float
) -> Iterator[dict[str, Any]]:
    """Yield parameter groups with and without weight decay.

    Biases and normalization parameters, which have one axis, are not decayed.
    """
    trainable = [p for p in parameters if p.requires_grad]
    for decayed in (True, False):
        chosen = [p for p in trainable if (p.ndim > 1) == decayed]
        if chosen:
            yield {
                "params": chosen,
                "lr": lr,
                "weight_decay": weight_decay if decayed else 0.0,
            }


class ConcatPool(nn.Module):
    """Averages and maxima over positions, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``(n, c, h, w)`` to ``(n, 2 * c)``."""
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


def fastai_network(task: Task) -> nn.Sequential:
    """Return the stages in one body, and the default head of fastai."""
    body = task.new_network()[:-2]
    side = task.setting.image_size
    with torch.no_grad():
        width = body.eval()(torch.zeros(1, 3, side, side)).shape[1]
    head = nn.Sequential(
        ConcatPool(),
        nn.BatchNorm1d(2 * width),
        nn.Dropout(0.25),
        nn.Linear(2 * width, 512, bias=False),
        nn.ReLU(),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, task.n_classes, bias=False),
    )
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return nn.Sequential(body, head)


def fastai_groups(network: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of the lower stages, the upper stages and the head."""
    body, head = network.children()
    stages = list(body.children())
    middle = len(stages) // 2
    lower, upper = nn.Sequential(*stages[:middle]), nn.Sequential(*stages[middle:])
    return [list(part.parameters()) for part in (lower, upper, head)]


def fastai_batches(task: Task) -> DataLoader[Any]:
    """Return batches of 32 images, augmented approximately as by fastai."""
    augmentations = [
        T.RandomApply([T.RandomAffine(10, scale=(1.0, 1.1))], 0.75),
        T.RandomApply([T.ColorJitter(0.2, 0.2)], 0.75),
    ]
    if task.setting.flip:
        augmentations.append(T.RandomHorizontalFlip())
    return task.loader(task.transform(*augmentations), batch_size=32)


def one_cycle(
    network: nn.Module,
    batches: DataLoader[Any],
    lrs: Sequence[float],
    n_epochs: int,
    pct_start: float,
    div: float,
) -> None:
    """Train with fastai's AdamW and one-cycle schedule, one rate per group."""
    groups: list[dict[str, Any]] = []
    for parameters, lr in zip(fastai_groups(network), lrs, strict=True):
        groups += decay_groups(parameters, lr, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, betas=(0.95, 0.99), eps=1e-5)
    scheduler = OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in groups],
        total_steps=n_epochs * len(batches),
        pct_start=pct_start,
        div_factor=div,
        final_div_factor=1e5 / div,
        base_momentum=0.85,
        max_momentum=0.95,
    )
    for _ in range(n_epochs):
        train_epoch(network, batches, optimizer, scheduler.step)


def fastai_recipe(task: Task) -> nn.Module:
    """Train as ``vision_learner(...).fine_tune(10)`` of fastai does.

    One epoch of the head, with fastai's default head of two layers on concatenated
    pooling, and of the BatchNorm layers below; then ten epochs of all layers, with
    rates from 1e-5 for the lower stages to 1e-3 for the head. Differences: batches of
    32 instead of 64, which suits small sets; ``aug_transforms()`` is approximated by
    rotation, zoom, lighting and (of photographs only) flips, without warping; no images
    are held out.
    """
    network = fastai_network(task)
    batches = fastai_batches(task)
    lr = 2e-3
    network[0].requires_grad_(False)
    for module in network[0].modules():
        if isinstance(module, BATCH_NORMS):
            module.requires_grad_(True)
    one_cycle(network, batches, [lr / 10, lr / 10, lr], 1, pct_start=0.99, div=25)
    network.requires_grad_(True)
    lr /= 2
    one_cycle(network, batches, [lr / 100, lr / 10, lr], 10, pct_start=0.3, div=5)
    return network


def fastai_itself(task: Task) -> nn.Module:
    """Train by ``Learner.fine_tune`` of fastai: network and batches as in the recipe.

    fastai computes a validation loss after each epoch, here of eight training images.
    """
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    # They add the methods `no_bar` and `fine_tune` to Learner.
    for name in ("progress", "schedule"):
        import_module(f"fastai.callback.{name}")
    network = fastai_network(task)
    valid = task.loader(task.transform(), 8, range(8), shuffle=False)
    learner = Learner(
        DataLoaders(fastai_batches(task), valid),
        network,
        loss_func=F.cross_entropy,
        splitter=fastai_groups,
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(10)
    return network


def warm_cosine(step: int, n_steps: int) -> float:
    """Return the factor of the learning rate: a tenth of warm-up, then a cosine."""
    n_warm = max(1, n_steps // 10)
    if step < n_warm:
        return step / n_warm
    return float(0.5 + 0.5 * np.cos(np.pi * (step - n_warm) / (n_steps - n_warm)))


class Checkpoints:
    """The three best states of a network on held-out images, and their average."""

    def __init__(self, network: nn.Module, held_out: DataLoader[Any]) -> None:
        self.network = network
        self.held_out = list(held_out)
        self.best: list[tuple[float, dict[str, Tensor]]] = []  # best first
        self.n_without_improvement = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether ten checks in a row have not improved the accuracy."""
        return self.n_without_improvement >= 10

    def check(self) -> None:
        """Evaluate the network, and keep its state if it is one of the three best."""
        if self.is_exhausted:
            return
        score = accuracy(self.network, self.held_out)
        improved = not self.best or score > self.best[0][0]
        self.n_without_improvement = 0 if improved else self.n_without_improvement + 1
        state = {k: v.clone() for k, v in self.network.state_dict().items()}
        # The sort is stable, so that of equal scores the earlier one stays.
        self.best = sorted([*self.best, (score, state)], key=lambda pair: -pair[0])[:3]

    def load_average(self) -> None:
        """Load the greedy average: a state is added unless the accuracy decreases."""
        best_score, first = self.best[0]
        chosen = [first]
        for _, state in self.best[1:]:
            self.network.load_state_dict(mean_state([*chosen, state]))
            score = accuracy(self.network, self.held_out)
            if score >= best_score:
                best_score = score
                chosen.append(state)
        self.network.load_state_dict(mean_state(chosen))


def mean_state(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average state dicts; tensors of integers are those of the first one."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def autogluon(task: Task) -> nn.Module:
    """Train with the published defaults of AutoGluon's MultiModalPredictor.

    AdamW, learning rate 1e-4, decayed by 0.9 per stage below the head, weight decay
    1e-3, 20 epochs of a cosine with warm-up of a tenth, gradient norms clipped at 1,
    TrivialAugment. A fifth of the images is held out and checked twice per epoch: the
    training stops after ten checks without improvement, and the best three checkpoints
    are averaged greedily. Differences: a step has 8 images, which is the size per
    device, instead of 128 by accumulation, which on 100 images would be one step per
    epoch; one level of decay per stage instead of per block; float32; the accuracy
    decides also between two classes.
    """
    train, held_out = train_test_split(
        np.arange(len(task.images)),
        test_size=0.2,
        stratify=task.targets,
        random_state=task.seed,
    )
    network = task.new_network()
    batches = task.loader(task.transform(T.TrivialAugmentWide()), 8, train)
    checkpoints = Checkpoints(
        network, task.loader(task.transform(), 32, held_out, shuffle=False)
    )
    groups: list[dict[str, Any]] = []
    for depth, part in enumerate(reversed(list(network.children()))):
        lr = 1e-4 * 0.9 ** max(0, depth - 1)  # the neck has no parameters
        groups += decay_groups(part.parameters(), lr, weight_decay=1e-3)
    optimizer = torch.optim.AdamW(groups)
    n_steps = 20 * len(batches)
    scheduler = LambdaLR(optimizer, partial(warm_cosine, n_steps=n_steps))
    checked = {max(1, len(batches) // 2), len(batches)}

    def after_step() -> None:
        scheduler.step()
        if (scheduler.last_epoch - 1) % len(batches) + 1 in checked:
            checkpoints.check()

    for _ in range(20):
        train_epoch(network, batches, optimizer, after_step, max_norm=1.0)
        if checkpoints.is_exhausted:
            break
    checkpoints.load_average()
    return network
