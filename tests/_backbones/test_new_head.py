"""Tests of new heads, compared with the untouched networks."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision import models

from sktl._backbones.new_head import replace_head
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing

FEW_FAMILIES = ["resnet_mini", "squeezenet1_1"]
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


@pytest.mark.parametrize(
    "family",
    [
        name if name in FEW_FAMILIES else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_input_of_the_head_is_the_penultimate_feature(family):
    backbone = load_backbone(family, None)
    network = replace_head(backbone, 3).eval()
    inputs = []

    handle = backbone.last_linear.register_forward_pre_hook(
        lambda module, arguments: inputs.append(arguments[0])
    )
    side = backbone.preprocessing.crop_size
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        backbone.network(x)
        got = network[:-1](x)
    handle.remove()
    expected = inputs[0].mean((2, 3)) if inputs[0].ndim == 4 else inputs[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert network(x).shape == (2, 3)


def as_vgg():
    """Build a network with the layers of those of VGG, which have many parameters."""
    linear = [nn.Linear(4 * 36, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8)]
    classifier = nn.Sequential(*linear, nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
    parts = {"features": nn.Conv2d(3, 4, 3), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict({**parts, "classifier": classifier}))


def test_hidden_layers_and_dropout_of_the_head():
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
    options = {"stages": {"stem": ["features"]}, "head": ["flatten", "classifier"]}
    register_backbone("as vgg", as_vgg, preprocessing=Preprocessing(8, 8), **options)
    vgg = replace_head(load_backbone("as vgg"), 3)
    assert sum(isinstance(m, nn.Dropout) for m in vgg.modules()) == 1


def test_head_that_cannot_be_replaced():
    class CustomHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = models.resnet18().fc

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    backbone = copy.deepcopy(load_backbone("resnet_mini"))
    backbone.network.head = CustomHead()  # the copy is not split yet
    with pytest.raises(ValueError, match=r"must be an nn\.Sequential"):
        replace_head(backbone, 3)
