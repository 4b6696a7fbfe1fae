"""Networks with fused BatchNorm have the output of the original networks."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.registry import load_backbone
from sktl._inference.fuse_batch_norm import fuse_batch_norm


def randomize_batch_norm(net):
    """Set the statistics of every BatchNorm as if it were trained."""
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
def test_every_pair_is_fused_and_the_output_stays_equal(name, pairs):
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False}
    options = options if name == "googlenet" else {}
    net = randomize_batch_norm(models.get_model(name, weights=None, **options))
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    assert fuse_batch_norm(net, 64) == pairs
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 0
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_the_activation_of_a_batch_norm_is_kept():
    class BatchNormAct(nn.BatchNorm2d):
        """As in timm: normalizes, then applies an activation."""

        def __init__(self, n_channels):
            super().__init__(n_channels)
            self.act = nn.ReLU6()

        def forward(self, x):
            return self.act(super().forward(x))

    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4), nn.Conv2d(4, 2, 1))
    net = randomize_batch_norm(net)
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    assert fuse_batch_norm(net, 8) == 1
    torch.testing.assert_close(net(x), expected)


def test_nothing_is_fused_where_it_is_not_exact():
    class Read(nn.Module):
        """A BatchNorm and an addition read the output of its convolution."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + self.bn(x)

    net = randomize_batch_norm(Read())
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    assert fuse_batch_norm(net, 8) == 0
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_modules_with_hooks_are_skipped():
    backbone = copy.deepcopy(load_backbone("resnet18", None))
    randomize_batch_norm(backbone.network)
    extractor = FeatureExtractor(backbone, ["layer1.0.conv1"], "avg").eval()
    assert fuse_batch_norm(extractor, 64) == 20 - 1
    x = torch.randn(1, 3, 64, 64)
    plain = FeatureExtractor(backbone, ["layer1.0.conv1"], "avg").eval()
    torch.testing.assert_close(extractor(x), plain(x), rtol=1e-4, atol=1e-5)


def test_parametrized_convolutions_are_skipped():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    net = randomize_batch_norm(nn.Sequential(conv, nn.BatchNorm2d(4)))
    assert fuse_batch_norm(net, 8) == 0


def test_batch_norm_without_statistics_is_skipped():
    own = nn.BatchNorm2d(4, track_running_stats=False)
    assert fuse_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), own).eval(), 8) == 0
