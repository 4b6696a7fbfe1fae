"""What trains moves, what is frozen keeps its bits, whatever the architecture."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from sktl._backbones.registry import load_backbone
from sktl._training.network import (
    PartiallyFrozen,
    n_trainable_stages,
    parameter_groups,
    replace_head,
)

STAGES = ["stem", "stage1", "stage2", "stage3"]
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet_mini",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_penultimate_feature_goes_into_the_head(family):
    backbone = load_backbone(family, None)
    network = replace_head(backbone, 3).eval()
    fed = []

    handle = backbone.last_linear.register_forward_pre_hook(
        lambda module, inputs: fed.append(inputs[0])
    )
    side = backbone.preprocessing.crop_size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        backbone.network(x)
        got = network[:-1](x)
    handle.remove()
    expected = fed[0].mean((2, 3)) if fed[0].ndim == 4 else fed[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert network(x).shape == (2, 3)


def one_step(partly):
    optimizer = torch.optim.SGD(partly.parameters(), lr=0.1, weight_decay=0.1)
    partly.train()
    partly(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("family", ["resnet18", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("trainable", ["head", 1])
def test_frozen_keeps_its_bits(family, trainable):
    network = replace_head(load_backbone(family, None), 3)
    before = copy.deepcopy(network.state_dict())
    names = [name for name, _ in network.named_children()][:-2]
    n_trainable = n_trainable_stages(trainable, names)
    one_step(PartiallyFrozen(network, n_trainable))
    trains = ("head.", *(f"{n}." for n in names[len(names) - n_trainable :]))
    trains += ("neck.",) if n_trainable else ()
    moved = {
        name
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved
    assert all(name.startswith(trains) for name in moved)
    parameters = {name for name, _ in network.named_parameters()}
    assert {n for n in parameters if n.startswith(trains)} <= moved


def test_the_backbone_that_others_share_stays_as_it_is():
    backbone = load_backbone("resnet_mini")
    before = copy.deepcopy(backbone.network.state_dict())
    one_step(PartiallyFrozen(replace_head(backbone, 3), 4))
    for name, value in backbone.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not backbone.network.training
    assert not any(p.requires_grad for p in backbone.network.parameters())


@pytest.mark.parametrize("n_trainable", range(6))
def test_stages_open_one_by_one(n_trainable):
    network = replace_head(load_backbone("resnet_mini"), 3)
    partly = PartiallyFrozen(network, 0)
    partly.train()
    partly.unfreeze(n_trainable)
    *stages, neck, head = network
    trains = [False] * (5 - n_trainable) + [True] * n_trainable
    assert [stage.training for stage in stages] == trains
    assert [next(s.parameters()).requires_grad for s in stages] == trains
    assert neck.training == (n_trainable > 0)
    assert head.training


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [("head", 0), ("all", 4), (0, 0), (2, 2), (4, 4), ("stage3", 1), ("stem", 4)],
)
def test_depth(trainable, expected):
    assert n_trainable_stages(trainable, STAGES) == expected


@pytest.mark.parametrize(
    ("trainable", "reason"),
    [("stage9", "one of the stages"), (5, "from 0 to 4"), (-1, "from 0 to 4")],
)
def test_no_such_depth(trainable, reason):
    with pytest.raises(ValueError, match=reason):
        n_trainable_stages(trainable, STAGES)
    with pytest.raises(ValueError, match="Do you mean 'stage3'"):
        n_trainable_stages("stage_3", STAGES)


def test_groups_are_those_of_the_definition():
    network = replace_head(load_backbone("resnet_mini"), 3)
    groups = parameter_groups(network, 9, lr=0.1, layer_decay=0.5, weight_decay=0.01)
    of_parameter = {id(p): group for group in groups for p in group["params"]}
    assert len(of_parameter) == sum(len(group["params"]) for group in groups)
    depth = {"head": 0, "neck": 1, "stage4": 1, "stage3": 2, "stage2": 3, "stage1": 4}
    for name, parameter in network.named_parameters():
        group = of_parameter.pop(id(parameter))
        part = name.split(".")[0]
        assert group["lr"] == pytest.approx(0.1 * 0.5 ** depth.get(part, 5))
        assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0)
    assert not of_parameter


@pytest.mark.parametrize("n_trainable", [0, 1, 3])
def test_an_optimizer_is_asked_for_what_trains_only(n_trainable):
    network = replace_head(load_backbone("resnet_mini"), 3)
    rates = {"lr": 0.1, "layer_decay": 0.5, "weight_decay": 0.01}
    groups = parameter_groups(network, n_trainable, **rates)
    PartiallyFrozen(network, n_trainable)
    opened = {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == opened


def test_the_head_as_it_was_asked_for():
    backbone = load_backbone("resnet_mini")
    network = replace_head(backbone, 3, hidden_layer_sizes=(16, 8), dropout=0.25)
    kinds = [type(layer).__name__ for layer in network.head]
    hidden = ["Dropout", "Linear", "ReLU"]
    assert kinds == [*hidden, *hidden, "Dropout", "Linear"]
    assert [m.out_features for m in network.head if isinstance(m, nn.Linear)] == [
        16,
        8,
        3,
    ]
    vgg = replace_head(load_backbone("vgg11", None), 3)
    assert sum(isinstance(m, nn.Dropout) for m in vgg.modules()) == 1


def test_bfloat16_computes_in_it_and_answers_in_float32():
    network = replace_head(load_backbone("resnet_mini"), 3)
    x = torch.randn(2, 3, 32, 32)
    exact = PartiallyFrozen(network, 1).eval()(x)
    rough = PartiallyFrozen(network, 1, torch.bfloat16).eval()(x)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


def test_a_head_without_a_place_for_another():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = models.resnet18().fc

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    backbone = copy.deepcopy(load_backbone("resnet_mini"))
    own = Own()
    backbone.network.head = own
    object.__setattr__(
        backbone, "cut", type(backbone.staged_model)(backbone.staged_model.stages, own)
    )
    with pytest.raises(ValueError, match=r"must be an nn\.Sequential"):
        replace_head(backbone, 3)
