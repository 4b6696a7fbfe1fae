"""Stages, neck and head of networks of timm."""

import pytest
import torch
from torch import nn

from sktl._backbones.stages import split_into_stages
from sktl._backbones.timm_structure import describe_network

timm = pytest.importorskip("timm")


def create(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, **options)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "sides", "n_prefix"),
    [
        ("test_resnet", [48, 24, 12, 6, 3], 0),
        ("test_efficientnet", [48, 24, 12, 6, 3], 0),
        ("test_convnext", [24, 24, 12, 6, 3], 0),
        ("test_vit", [6, 6, 6, 6, 6], 1),
    ],
)
def test_stages_and_neck_are_the_network(name, sides, n_prefix):
    network = create(name, **({"dynamic_img_size": True} if "vit" in name else {}))
    structure = describe_network(network)
    parts = split_into_stages(structure, 96)
    x = torch.randn(2, 3, 96, 96)
    expected = network.forward_features(x)
    penultimate = network.forward_head(expected, pre_logits=True)
    y = x
    for stage, side in zip(parts.stages.items(), sides, strict=True):
        y = stage[1](y)
        assert structure.n_prefix_tokens(stage[0]) == n_prefix
        n_positions = y.shape[1] - n_prefix if y.ndim == 3 else y.shape[2] * y.shape[3]
        assert n_positions == side * side
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(parts.neck(y), penultimate, atol=1e-5)
    assert torch.allclose(parts.head(y), network(x), atol=1e-5)
