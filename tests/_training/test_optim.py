"""A step is that of torch: the loss, the rates, the state of the optimizer."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from sktl._backbones.registry import load_backbone
from sktl._training.network import replace_head
from sktl._training.optim import (
    WeightedCrossEntropy,
    load_optimizer_state,
    lr_lambda,
    make_optimizer,
)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_loss_is_that_of_torch(label_smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator)
    label = torch.randint(3, (8,), generator=generator)
    got = WeightedCrossEntropy(label_smoothing)(logits, (label, torch.ones(8)))
    expected = nn.CrossEntropyLoss(label_smoothing=label_smoothing)(logits, label)
    torch.testing.assert_close(got, expected)


def test_weight_2_is_the_gradient_of_the_image_twice():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    label, weight = torch.tensor([0, 3, 1]), torch.tensor([1.0, 2.0, 0.0])
    criterion = WeightedCrossEntropy(0.1)
    heavy = logits.clone().requires_grad_()
    (3 * criterion(heavy, (label, weight))).backward()
    twice = logits[[0, 1, 1]].clone().requires_grad_()
    (3 * criterion(twice, (label[[0, 1, 1]], torch.ones(3)))).backward()
    torch.testing.assert_close(heavy.grad[0], twice.grad[0])
    torch.testing.assert_close(heavy.grad[1], twice.grad[1] + twice.grad[2])
    assert not heavy.grad[2].any()


def rates_of(make, n_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("n_steps", [3, 10, 47, 200])
def test_onecycle_is_that_of_torch(n_steps):
    # torch's last step has the rate 0; here that would be the step after the last.
    n_up, total = math.ceil(0.3 * n_steps), n_steps + 1

    def make(optimizer):
        return OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=total,
            pct_start=(n_up + 1) / total,
            cycle_momentum=False,
            final_div_factor=1e12,
        )

    got = [lr_lambda("onecycle", step, n_steps) for step in range(n_steps)]
    np.testing.assert_allclose(got, rates_of(make, n_steps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_steps", [1, 3, 10, 47, 200])
def test_cosine_is_that_of_torch_after_the_warm_up(n_steps):
    n_up = math.ceil(n_steps / 10)
    got = [lr_lambda("cosine", step, n_steps) for step in range(n_steps)]
    warm_up = np.arange(1, n_up + 1) / (n_up + 1)
    np.testing.assert_allclose(got[:n_up], warm_up, rtol=1e-9)
    n_down = n_steps - n_up
    if n_down:
        expected = rates_of(lambda o: CosineAnnealingLR(o, T_max=n_down), n_down)
        np.testing.assert_allclose(got[n_up:], expected, rtol=1e-9, atol=1e-9)
    assert all(0 < rate <= 1 for rate in got)
    assert {lr_lambda("constant", step, n_steps) for step in range(n_steps)} == {1}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(optimizer):
    network = replace_head(load_backbone("tiny", None), 3)
    network.to(memory_format=torch.channels_last)
    mine = make_optimizer(network, 3, optimizer, 0.5, 0.1, [], lr=0.1)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def step(network, optimizer):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    step(network, mine)
    other = copy.deepcopy(network)
    again = make_optimizer(other, 3, optimizer, 0.5, 0.1, [], lr=0.1)
    load_optimizer_state(again, mine.state_dict()["state"])
    step(network, mine)
    step(other, again)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert again.param_groups[0]["highest_lr"] == 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("value", [None, torch.ones(3, 7), torch.tensor(True)])
def test_the_state_of_another_optimizer_is_refused(optimizer, value):
    network = replace_head(load_backbone("tiny", None), 3)
    mine = make_optimizer(network, 3, optimizer, 0.5, 0.1, [], lr=0.1)
    network(torch.ones(2, 3, 16, 16)).sum().backward()
    mine.step()
    for name in list(mine.state_dict()["state"][0]):
        state = mine.state_dict()["state"]
        state[0] = {**state[0], name: value}
        if value is None:
            del state[0][name]
        with pytest.raises(ValueError, match="of parameter 0 is of another optimizer"):
            load_optimizer_state(mine, state)
