"""Tests of learning rate schedules, parameter groups and optimizers."""

import copy
import math

import numpy as np
import pytest
import torch
from shared_fixtures import StagedNet
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torchvision.models import VisionTransformer

from sktl._backbones.new_head import replace_head
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._backbones.saved_network import Architecture, saved_names
from sktl._backbones.source import HeadConfig
from sktl._images.preprocessing import Preprocessing
from sktl._training.network import PartiallyFrozen
from sktl._training.optim import (
    load_optimizer_state,
    lr_lambda,
    make_optimizer,
    parameter_groups,
)


def learning_rates(make_scheduler, n_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("n_steps", [3, 10, 47, 200])
def test_onecycle_equals_torch(n_steps):
    # torch's last step has the rate 0; here that would be the step after the last.
    n_up, total = math.ceil(0.3 * n_steps), n_steps + 1

    def make_scheduler(optimizer):
        return OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=total,
            pct_start=(n_up + 1) / total,
            cycle_momentum=False,
            final_div_factor=1e12,
        )

    got = [lr_lambda("onecycle", step, n_steps) for step in range(n_steps)]
    np.testing.assert_allclose(
        got, learning_rates(make_scheduler, n_steps), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("n_steps", [1, 3, 10, 47, 200])
def test_cosine_equals_torch_after_the_warm_up(n_steps):
    n_up = math.ceil(n_steps / 10)
    got = [lr_lambda("cosine", step, n_steps) for step in range(n_steps)]
    warm_up = np.arange(1, n_up + 1) / (n_up + 1)
    np.testing.assert_allclose(got[:n_up], warm_up, rtol=1e-9)
    n_down = n_steps - n_up
    if n_down:
        expected = learning_rates(lambda o: CosineAnnealingLR(o, T_max=n_down), n_down)
        np.testing.assert_allclose(got[n_up:], expected, rtol=1e-9, atol=1e-9)
    assert all(0 < rate <= 1 for rate in got)
    assert {lr_lambda("constant", step, n_steps) for step in range(n_steps)} == {1}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_loaded_optimizer_continues_with_equal_bits(optimizer):
    network = replace_head(load_backbone("tiny", None), 3)
    network.to(memory_format=torch.channels_last)
    first = make_optimizer(network, 3, optimizer, 0.5, 0.1, 1.0, [], lr=0.1)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def step(network, optimizer):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    step(network, first)
    other = copy.deepcopy(network)
    second = make_optimizer(other, 3, optimizer, 0.5, 0.1, 1.0, [], lr=0.1)
    load_optimizer_state(second, optimizer, first.state_dict()["state"])
    step(network, first)
    step(other, second)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert second.param_groups[0]["max_lr"] == 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("value", [None, torch.ones(3, 7), torch.tensor(True)])
def test_state_of_another_optimizer(optimizer, value):
    network = replace_head(load_backbone("tiny", None), 3)
    first = make_optimizer(network, 3, optimizer, 0.5, 0.1, 1.0, [], lr=0.1)
    network(torch.ones(2, 3, 16, 16)).sum().backward()
    first.step()
    for name in list(first.state_dict()["state"][0]):
        state = first.state_dict()["state"]
        state[0] = {**state[0], name: value}
        if value is None:
            del state[0][name]
        with pytest.raises(ValueError, match="of parameter 0 is of another optimizer"):
            load_optimizer_state(first, optimizer, state)


@pytest.mark.parametrize("number", [-1, 99])
def test_state_of_a_parameter_that_does_not_exist(number):
    network = replace_head(load_backbone("tiny", None), 3)
    optimizer = make_optimizer(network, 3, "sgd", 0.5, 0.1, 1.0, [], lr=0.1)
    with pytest.raises(ValueError, match=f"parameter {number} too many"):
        load_optimizer_state(optimizer, "sgd", {number: {}})


@pytest.mark.parametrize("name", ["resnet_mini", "timm/test_vit"])
def test_parameter_groups(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    network = replace_head(load_backbone(name, None), 3)
    groups = parameter_groups(network, 9, lr=0.1, layer_decay=0.5, weight_decay=0.01)
    group_of = {id(p): group for group in groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in groups)
    depth = {"head": 0, "neck": 1, "stage4": 1, "stage3": 2, "stage2": 3, "stage1": 4}
    for name, parameter in network.named_parameters():
        group = group_of.pop(id(parameter))
        part = name.split(".")[0]
        assert group["lr"] == pytest.approx(0.1 * 0.5 ** depth.get(part, 5))
        is_token = name.endswith(("cls_token", "pos_embed"))
        decays = parameter.ndim > 1 and not is_token
        assert group["weight_decay"] == (0.01 if decays else 0)
    assert not group_of


def test_learning_rate_of_the_last_layer():
    network = replace_head(load_backbone("tiny", None), 3, hidden_layer_sizes=[4])
    optimizer = make_optimizer(network, 9, "adamw", 0.5, 0.1, 2.0, [], lr=0.1)
    rates = {id(p): g["max_lr"] for g in optimizer.param_groups for p in g["params"]}
    hidden, _, output = network.head
    assert {rates[id(p)] for p in output.parameters()} == {0.2}
    assert {rates[id(p)] for p in hidden.parameters()} == {0.1}
    assert all(rates[id(p)] < 0.1 for p in network[:-1].parameters())


def names_without_decay(backbone):
    """Return names, in the original network, of parameters without weight decay."""
    network = replace_head(backbone, 3)
    saved = saved_names(backbone, network)
    groups = parameter_groups(network, 9, lr=1, layer_decay=1, weight_decay=0.01)
    fixed = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    names = {saved[n] for n, p in network.named_parameters() if id(p) in fixed}
    return {n.removeprefix("backbone.") for n in names if not n.startswith("heads.")}


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_vit4",  # a register and no class token
        "vit_tiny_patch16_dinov3_qkvb",
        "beit_base_patch16_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",  # wildcards
        "test_resnet",
    ],
)
@pytest.mark.slow
def test_weight_decay_is_applied_as_timm_does(name):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=0)
    own = getattr(network, "no_weight_decay", set)()
    group = pytest.importorskip("timm.optim").param_groups_weight_decay
    no_decay = group(network, 0.01, no_weight_decay_list=own)[0]
    fixed = {id(p) for p in no_decay["params"]}
    expected = {n for n, p in network.named_parameters() if id(p) in fixed}
    assert no_decay["weight_decay"] == 0
    assert names_without_decay(load_backbone(f"timm/{name}", None)) == expected


class Positions(StagedNet):
    """A network that declares a parameter without weight decay."""

    def __init__(self):
        stem = nn.Conv2d(3, 4, 3)
        stem.positions = nn.Parameter(torch.zeros(1, 4, 1, 1))
        super().__init__({"stem": stem}, 4)

    def no_weight_decay(self):
        return {"*.positions"}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: VisionTransformer(32, 16, 4, 2, 8, 8, num_classes=3),
            {"class_token", "encoder.pos_embedding"},
        ),
        (Positions, {"stages.stem.positions"}),
    ],
)
def test_weight_decay_of_a_registered_network(build, expected):
    register_backbone("mine", build, preprocessing=Preprocessing(32, 32))
    backbone = load_backbone("mine")
    parameters = dict(backbone.network.named_parameters())
    names = names_without_decay(backbone)
    assert {name for name in names if parameters[name].ndim > 1} == expected
    # The network of a second fine-tuning is the one that the first has made.
    second = Architecture("mine", (HeadConfig(),)).build(backbone, 3)
    network = second.network
    assert names_without_decay(second) == names
    assert replace_head(second, 3).no_weight_decay == network.no_weight_decay


def test_a_parameter_of_several_stages_is_in_one_group():
    network = replace_head(load_backbone("resnet_mini", None), 3)
    shared = nn.Linear(2, 2)
    for part in (network.stage2, network.stage3, network.stage4, network.neck):
        part.append(shared)
    optimizer = make_optimizer(network, 9, "sgd", 0.5, 0.1, 1.0, [], lr=0.1)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == {id(parameter) for parameter in network.parameters()}
    assert rates[id(shared.weight)] == rates[id(shared.bias)] == 0.05


def test_a_parameter_that_a_frozen_stage_shares_is_not_trained():
    network = replace_head(load_backbone("resnet_mini", None), 3)
    network.stage4.append(network.stage1[0])
    PartiallyFrozen(network, 1)
    before = [p.clone() for p in network.stage1.parameters()]
    optimizer = make_optimizer(network, 1, "sgd", 0.5, 0.1, 1.0, [], lr=0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, before, network.stage1.parameters()))


@pytest.mark.parametrize("n_trainable", [0, 1, 3])
def test_parameter_groups_contain_trainable_parameters_only(n_trainable):
    network = replace_head(load_backbone("resnet_mini"), 3)
    rates = {"lr": 0.1, "layer_decay": 0.5, "weight_decay": 0.01}
    groups = parameter_groups(network, n_trainable, **rates)
    PartiallyFrozen(network, n_trainable)
    trainable = {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == trainable
