"""Tests of sktl._backbones.named_modules."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import Permute

from sktl._backbones.named_modules import (
    describe_named_parts,
    module_to_text,
    text_to_module,
)


@pytest.mark.parametrize(
    "module",
    [
        nn.Flatten(1),
        nn.ReLU(inplace=True),
        nn.GELU("tanh"),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.Dropout(0.3),
        nn.Identity(),
    ],
)
def test_a_text_gives_an_equal_module(module: nn.Module) -> None:
    got = text_to_module(module_to_text(module))
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert type(got) is type(module)
    assert torch.equal(got(x), module.eval()(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        nn.BatchNorm2d(2, affine=False),  # has buffers
        nn.Sequential(nn.ReLU()),
        Permute([0, 2, 3, 1]),  # not of torch.nn
        nn.AvgPool2d(2, ceil_mode=True),  # which its text does not say
        nn.Upsample(scale_factor=2),  # any size
    ],
)
def test_other_modules_raise(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="and have no parameters"):
        module_to_text(module)


@pytest.mark.parametrize(
    "text",
    [
        "Flatten",
        "Flatten(",
        "Flatten(start_dim=len('a'))",
        "__import__('os')()",
        "Parameter(1)",
        "Linear(1000000000, 1000000000)",
        "Flatten(1, 2, 3)",
        "nn.Flatten(1)",
        # None of these is built, which would take forever.
        "Transformer(num_encoder_layers=1000000000)",
        "MultiheadAttention(4096, 1, kdim=1000000000)",
        "AdaptiveAvgPool2d((1, 100000))",
        "ZeroPad2d(1e9)",
    ],
)
def test_other_texts_raise(text: str) -> None:
    with pytest.raises(ValueError, match="and have no parameters"):
        text_to_module(text)


def _network() -> nn.Sequential:
    blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)])
    layers = {"conv1": nn.Conv2d(3, 3, 3), "blocks": blocks, "fc": nn.Linear(3, 2)}
    return nn.Sequential(OrderedDict(layers))  # type: ignore[arg-type]


def test_parts_consist_of_the_modules_of_the_network() -> None:
    network = _network()
    head = ["AdaptiveAvgPool2d(output_size=1)", "Flatten()", "fc"]
    structure = describe_named_parts(
        network, [("stem", ["conv1"]), ("top", ["blocks"])], head
    )
    assert structure.stages is not None
    stages = [list(part) for part in structure.stages.values()]  # type: ignore[call-overload]
    assert stages == [[network.conv1], list(network.blocks)]
    x = torch.zeros(2, 3, 8, 8)
    for part in [*structure.stages.values(), *structure.head]:
        x = part(x)
    assert x.shape == (2, 2)


@pytest.mark.parametrize(
    ("stages", "head", "message"),
    [
        ([("stem", ["conv"])], ["fc"], r"'stem' must name .* Got 'conv'.*mean conv1\?"),
        ([("stem", ["conv1"])], ["x"], "Got 'x'. Its modules begin with conv1, blocks"),
        ([("stem", [""])], ["fc"], "Got ''"),
        (
            [("stem", ["blocks"]), ("stage1", ["blocks.1"])],
            ["fc"],
            "Got one that is in 'stem' and in 'stage1'",
        ),
    ],
)
def test_invalid_names_raise(
    stages: list[tuple[str, list[str]]], head: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe_named_parts(_network(), stages, head)
