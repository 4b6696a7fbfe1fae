"""Tests of sktl._backbones.register."""

import pytest
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from sktl._backbones import registered, registry
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing
from sktl._utils.keyed_cache import KeyedCache

_SMALL = Preprocessing(resize_size=32, crop_size=32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without cached or registered backbones."""
    monkeypatch.setattr(registered, "definitions", {})
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))


def _resnet10() -> models.ResNet:
    return models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


class _Cheating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return -self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": 3}, TypeError, "must be a str. Got 3"),
        ({"name": ""}, ValueError, "must not be empty"),
        ({"name": "resnet18"}, ValueError, "nor the name of the bundled network"),
        ({"builder": _resnet10()}, TypeError, "a function that returns a network"),
        (
            {"builder": "resnet"},
            TypeError,
            "a function that returns a network. Got str",
        ),
        ({"builder": lambda: 3}, TypeError, "must return a torch.nn.Module. Got int"),
        ({"categories": ["a"]}, ValueError, "has 10 outputs. Got 1 names"),
        ({"builder": _Cheating}, ValueError, "_Cheating, run in order"),
        ({"preprocessing": 32}, TypeError, "preprocessing must be a sktl.Preproc"),
        ({"layout": "HWC"}, ValueError, "must be None, 'NCHW' or 'NHWC'. Got 'HWC'"),
    ],
)
def test_invalid_backbones_raise(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    given = {"name": "mine", "builder": _resnet10, "preprocessing": _SMALL, **arguments}
    with pytest.raises(error, match=message):  # noqa: PT012
        register_backbone(**given)  # type: ignore[arg-type]
        load_backbone("mine")
