"""Tests of sktl._backbones.without_classifier."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from sktl._backbones.source import NetworkStructure
from sktl._backbones.stages import describe_network
from sktl._backbones.without_classifier import find_neck
from sktl._images.preprocessing import Preprocessing

_SMALL = Preprocessing(8, 8)
_BODY = (nn.Conv2d(3, 4, 3), nn.Flatten(1))
_WIDTH = 4 * 6 * 6


def _resnet() -> nn.Module:
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def _alexnet() -> nn.Module:
    return nn.Sequential(nn.Upsample(64), models.AlexNet(num_classes=3))


@pytest.mark.parametrize(
    ("build", "last"), [(_resnet, "fc"), (_alexnet, "1.classifier.6")]
)
def test_output_is_the_input_of_the_last_layer(build, last) -> None:
    network = build().eval()
    before = copy.deepcopy(network)
    (neck,) = find_neck(network, describe_network(network), _SMALL) or ()
    seen: list[Tensor] = []
    layer = network.get_submodule(last)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(network(x), before(x))
        assert torch.equal(neck(x), seen[0])
    own = [p for name, p in network.named_parameters() if not name.startswith(last)]
    assert list(map(id, neck.parameters())) == list(map(id, own))


class _Custom(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.body = nn.Sequential(*_BODY)
        self.fc = nn.Linear(_WIDTH, 3)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.fc(self.body(x)).softmax(1),
        lambda self, x: self.fc(self.body(x)).relu_(),
        lambda self, x: nn.functional.linear(self.body(x), self.fc.weight),
        lambda self, x: self.body(x) if self.fc.in_features else x,
        lambda self, x: self.fc(self.fc(self.body(x)).repeat(1, 48)),
        lambda self, x: self.fc(self.body(x).unflatten(1, (1, _WIDTH))),
        lambda self, x: self.fc(x),  # fails
    ],
)
def test_networks_that_do_not_end_with_the_layer(forward) -> None:
    network = _Custom(forward).eval()
    assert find_neck(network, describe_network(network), _SMALL) is None
    ends = _Custom(lambda self, x: self.fc(self.body(x))).eval()
    assert find_neck(ends, describe_network(ends), _SMALL) is not None


def test_values_are_not_needed() -> None:
    network = _resnet().eval().to("meta")
    (neck,) = find_neck(network, describe_network(network), _SMALL) or ()
    assert neck(torch.zeros(1, 3, 8, 8, device="meta")).shape == (1, 512)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("head", "is_neck"),
    [
        ([nn.Flatten(1)], True),
        ([nn.Identity()], False),  # (n, c, h, w)
        ([nn.Flatten(1), nn.Linear(_WIDTH, 3)], False),
    ],
)
def test_head_without_linear_layer(head, is_neck: bool) -> None:
    network = nn.Sequential(_BODY[0], *head).eval()
    structure = NetworkStructure(stages={"stem": _BODY[0]}, head=head)
    neck = find_neck(network, structure, _SMALL)
    assert neck == (head if is_neck else None)
    # Also if the stages have one.
    staged = replace(structure, stages={"stem": nn.Linear(1, 1)})
    assert find_neck(network, staged, _SMALL) == neck


def test_a_linear_layer_alone() -> None:
    layer = nn.Linear(8, 3).eval()
    assert find_neck(layer, describe_network(layer), _SMALL) is None
