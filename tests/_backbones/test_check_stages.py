"""Tests of sktl._backbones.check_stages."""

import pytest
import torch
from torch import Tensor, nn

from sktl._backbones.check_stages import check_staged_model
from sktl._backbones.stages import StagedModel


class _Net(nn.Module):
    """Network of two layers; it may support images of one size only."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 16, stride=16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 2)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if self.side not in (None, x.shape[-1]):
            raise ValueError("another size")
        x = self.conv(x).relu()
        return self.fc(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def _staged(network: _Net, *head: nn.Module) -> StagedModel:
    stem = nn.Sequential(network.conv, nn.ReLU())
    return StagedModel({"stem": stem}, nn.Sequential(*head, network.fc))


@pytest.mark.parametrize("side", [None, 16])
def test_equal_stages(side: int | None) -> None:
    network = _Net(side).eval()
    check_staged_model(network, _staged(network, network.pool, nn.Flatten()), 16)


def test_wrong_pooling_of_one_position_raises() -> None:
    # One position for images of 16 pixels, where maximum and average are equal.
    network = _Net().eval()
    staged = _staged(network, nn.AdaptiveMaxPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(staged(x), network(x))
    with pytest.raises(ValueError, match=r"after 'conv' 'fc', where .* runs 'pool'"):
        check_staged_model(network, staged, 16)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_stages_that_raise() -> None:
    network = _Net().eval()
    with pytest.raises(ValueError, match=r"'fc' with the shape \(2, 4, 1, 1\) inst"):
        check_staged_model(network, _staged(network, network.pool), 16)
    with pytest.raises(ValueError, match="Got an error after 'pool'"):
        check_staged_model(network, _staged(network, network.pool, nn.Flatten(7)), 16)
