"""What networks of timm tell about themselves."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from sktl._backbones import registered
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._backbones.timm_methods import is_timm_network
from sktl._images.preprocessing import Preprocessing

timm = pytest.importorskip("timm")


class _SameNames(nn.Module):
    """Not a network of timm, with methods of the same names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward_features(self, x):
        return self.conv(x).mean((2, 3))

    def forward_head(self, x):
        return self.fc(x)

    def reset_classifier(self, num_classes):
        raise NotImplementedError

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class _Renamed(_SameNames):
    pretrained_cfg: ClassVar[dict[str, object]] = {}


class _WithFlag(_SameNames):
    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.fc(x)


class _OfTimm(_WithFlag):
    pretrained_cfg: ClassVar[dict[str, object]] = {}


def test_is_timm_network():
    assert is_timm_network(timm.create_model("test_resnet"))
    assert is_timm_network(timm.models.ResNet(timm.models.resnet.BasicBlock, [1] * 4))
    assert not is_timm_network(nn.Linear(1, 1))
    assert not any(is_timm_network(c()) for c in (_SameNames, _Renamed, _WithFlag))
    assert is_timm_network(_OfTimm())


@pytest.mark.parametrize("network", [_SameNames, _OfTimm])
def test_other_networks_keep_their_penultimate_features(network, monkeypatch):
    # The second one is taken for one of timm.
    monkeypatch.setattr(registered, "registrations", {})
    register_backbone("mine", network, preprocessing=Preprocessing(8, 8))
    backbone = load_backbone("mine")
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        features = FeatureExtractor(backbone, ["penultimate"], "avg")(x)
        expected = backbone.network.forward_features(x)
    torch.testing.assert_close(features, expected)
