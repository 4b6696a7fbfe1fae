"""BatchNorm merged into convolutions, against the network as it was."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.registry import load_backbone
from sktl._inference.fuse_batch_norm import fuse_batch_norm


def trained_batch_norm(net):
    """Give every BatchNorm statistics as if it had seen data."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.bias.data):
                value.copy_(torch.randn(value.shape, generator=generator) / 10)
            for value in (module.running_var, module.weight.data):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("resnet18", 20), ("mobilenet_v2", 52), ("squeezenet1_1", 0), ("googlenet", 57)],
)
def test_folding_merges_every_pair_and_keeps_the_output(name, pairs):
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False}
    options = options if name == "googlenet" else {}
    net = trained_batch_norm(models.get_model(name, weights=None, **options))
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    assert fuse_batch_norm(net, 64) == pairs
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 0
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_folding_gives_up_where_it_is_not_exact():
    class Read(nn.Module):
        """Its convolution is read by a BatchNorm and by an addition."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + self.bn(x)

    net = trained_batch_norm(Read())
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    assert fuse_batch_norm(net, 8) == 0
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_folding_leaves_what_is_looked_at():
    backbone = copy.deepcopy(load_backbone("resnet18", None))
    trained_batch_norm(backbone.network)
    extractor = FeatureExtractor(backbone, ["layer1.0.conv1"], "avg").eval()
    assert fuse_batch_norm(extractor, 64) == 20 - 1
    x = torch.randn(1, 3, 64, 64)
    plain = FeatureExtractor(backbone, ["layer1.0.conv1"], "avg").eval()
    torch.testing.assert_close(extractor(x), plain(x), rtol=1e-4, atol=1e-5)


def test_folding_skips_convolutions_that_compute_their_weights():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    net = trained_batch_norm(nn.Sequential(conv, nn.BatchNorm2d(4)))
    assert fuse_batch_norm(net, 8) == 0


def test_folding_skips_what_has_no_statistics():
    own = nn.BatchNorm2d(4, track_running_stats=False)
    assert fuse_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), own).eval(), 8) == 0
