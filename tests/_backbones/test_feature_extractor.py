"""Layers are compared with what torchvision's network computes on its own."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import Permute

from sktl._backbones import feature_extractor
from sktl._backbones.feature_extractor import (
    FeatureExtractor,
    layer_widths,
    reraise_invalid_size,
)
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing

# One of each way a layer can be reached, in the words of sktl and of torchvision.
RESNET18 = {
    "stem": "relu",
    "stage1": "layer1",
    "stage3": "layer3",
    "layer2.0.conv1": "layer2.0.conv1",
    "bn1": "bn1",
}


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def extract(backbone, layers, pooling, x):
    with torch.inference_mode():
        return FeatureExtractor(backbone, layers, pooling).eval()(x.clone())


@pytest.mark.parametrize("layer", RESNET18)
def test_a_layer_is_what_torchvision_computes(layer, noise):
    backbone = load_backbone("resnet18", None)
    # An extractor of torchvision runs a traced copy, in which nothing is in place.
    reference = create_feature_extractor(backbone.network, [RESNET18[layer]])
    with torch.inference_mode():
        expected = reference(noise)[RESNET18[layer]]
    if layer == "bn1":  # torchvision's copy too goes on to overwrite it
        with torch.inference_mode():
            expected = backbone.network.bn1(backbone.network.conv1(noise))
    got = extract(backbone, [layer], "flatten", noise)
    torch.testing.assert_close(got, expected.flatten(1))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "squeezenet1_1",
        pytest.param("vgg11", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_penultimate_and_last_linear_make_the_logits(name, noise):
    backbone = load_backbone(name, None)
    features = extract(backbone, ["penultimate"], "flatten", noise)
    last = backbone.last_linear
    with torch.inference_mode():
        if isinstance(last, torch.nn.Conv2d):  # SqueezeNet: (n, 512, 3, 3)
            maps = last(features.unflatten(1, (512, 3, 3)))
            logits = maps.relu().mean((2, 3))
        else:
            logits = last(features)
        torch.testing.assert_close(logits, backbone.network(noise))


def test_several_layers_stand_side_by_side(noise):
    backbone = load_backbone("squeezenet1_1", None)
    layers = ["stage2", "penultimate", "stem", "classifier.1"]
    together = extract(backbone, layers, "max", noise)
    alone = [extract(backbone, [layer], "max", noise) for layer in layers]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_extractor_contains_only_the_stages_it_needs():
    backbone = load_backbone("resnet18", None)
    extractor = FeatureExtractor(backbone, ["stage1"], "avg")
    kept = sum(parameter.numel() for parameter in extractor.parameters())
    below = [backbone.network.conv1, backbone.network.bn1, backbone.network.layer1]
    assert kept == sum(p.numel() for part in below for p in part.parameters())


def test_extractor_leaves_no_hooks_on_the_shared_network(noise):
    backbone = load_backbone("resnet18", None)
    extract(backbone, ["layer1", "penultimate"], "avg", noise)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in backbone.network.modules()
    )


@pytest.mark.slow
def test_a_transformer_has_features_and_stages():
    backbone = load_backbone("vit_b_16", None)
    x = torch.randn(1, 3, 224, 224)
    features = extract(backbone, ["penultimate"], "avg", x)
    tokens = extract(backbone, ["encoder"], "avg", x)
    assert features.shape == tokens.shape == (1, 768)
    with torch.inference_mode():
        logits = backbone.network.heads(features)
        torch.testing.assert_close(logits, backbone.network(x))
    layer = extract(backbone, ["encoder.layers.encoder_layer_2"], "avg", x)
    torch.testing.assert_close(extract(backbone, ["stage1"], "avg", x), layer)


@pytest.mark.slow
def test_swin_maps_are_turned_to_channels_first():
    swin = load_backbone("swin_t", None)
    x = torch.randn(1, 3, 64, 64)
    by_module = extract(swin, ["features.1"], 2, x)
    torch.testing.assert_close(by_module, extract(swin, ["stage1"], 2, x))
    assert by_module.shape == (1, 96 * 2 * 2)


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [
        ("convnext_tiny", "features.1.0.block.0", 96),
        ("convnext_tiny", "features.1.0.block.3", 384),
        ("convnext_tiny", "features.1.0.block.6", 96),
        ("convnext_tiny", "features.2.0", 96),
        ("swin_t", "features.0.0", 96),
        ("swin_t", "features.0.2", 96),
        ("swin_t", "features.3.1.mlp", 192),
        ("swin_t", "norm", 768),
        ("swin_t", "permute", 768),
    ],
)
def test_channels_are_found_where_a_network_moves_them(name, layer, channels, noise):
    backbone = load_backbone(name, None)
    assert extract(backbone, [layer], "avg", noise).shape == (2, channels)


def test_stage_names_take_precedence_over_module_names(noise):
    # torchvision's ShuffleNet has modules stage2 to stage4; our stages end at stage3.
    backbone = load_backbone("shufflenet_v2_x0_5", None)
    with torch.inference_mode():
        expected = noise
        for stage in list(backbone.stages.values())[:3]:
            expected = stage(expected)
    got = extract(backbone, ["stage2"], "flatten", noise)
    torch.testing.assert_close(got, expected.flatten(1))
    with pytest.raises(ValueError, match=r"\(stem, stage1, stage2, stage3\)"):
        FeatureExtractor(backbone, ["stage4"], "avg")


@pytest.mark.slow
def test_layers_without_one_row_per_image_raise(noise):
    backbone = load_backbone("swin_v2_t", None)
    with pytest.raises(
        ValueError, match=r"one row per image. Got \d+ rows for 2 images"
    ):
        extract(backbone, ["features.1.0.attn.cpb_mlp"], "flatten", noise)
    maxvit = load_backbone("maxvit_t", None)
    inside = "blocks.0.layers.0.layers.window_attention.mlp_layer"
    with pytest.raises(ValueError, match=r"windows, positions and channels"):
        FeatureExtractor(maxvit, [inside], "avg")


def test_errors_list_the_available_layers(noise):
    backbone = load_backbone("squeezenet1_1", None)
    with pytest.raises(
        ValueError,
        match=r"Got 'clasifier' .* classifier.* describe_backbone\('squ",
    ):
        FeatureExtractor(backbone, ["clasifier"], "avg")
    with pytest.raises(ValueError, match=r"\(stem, stage1, stage2, stage3\)"):
        FeatureExtractor(backbone, ["stage9"], "avg")
    # The stages run block by block, so the container of the blocks never does.
    with pytest.raises(ValueError, match=r"'features' does not run .* FeatureUnion"):
        extract(backbone, ["features", "stage1"], "avg", noise)


@pytest.mark.parametrize(
    ("name", "layers", "pooling", "side"),
    [
        ("resnet_mini", ["stem", "penultimate"], "avg", 40),
        ("resnet18", ["layer1.0.conv1", "stage2"], 3, 64),
        ("squeezenet1_1", ["penultimate"], "flatten", 70),
        pytest.param(
            "swin_t", ["features.1", "stage1"], 2, 224, marks=pytest.mark.slow
        ),
        pytest.param(
            "googlenet", ["stage1", "penultimate"], "gem", 64, marks=pytest.mark.slow
        ),
    ],
)
def test_widths_are_those_of_the_features(name, layers, pooling, side):
    weights = "DEFAULT" if name == "resnet_mini" else None
    backbone = load_backbone(name, weights)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = [extract(backbone, [one], pooling, x).shape[1] for one in layers]
    preprocessing = backbone.preprocessing_at(side)
    assert layer_widths(backbone, layers, pooling, preprocessing) == tuple(expected)


def test_widths_are_measured_once(monkeypatch):
    backbone = load_backbone("resnet_mini")
    given = (backbone, ["stage1", "stem"], "max", backbone.preprocessing)
    expected = layer_widths(*given)
    monkeypatch.setattr(feature_extractor, "FeatureExtractor", None)
    assert layer_widths(*given) == expected


class ReadsValues(nn.Module):
    """Its forward method reads values, which meta tensors do not have."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = self.body(x / max(1.0, x.max().item()))
        return self.head(x.mean((2, 3)))


def test_widths_of_a_network_that_reads_values():
    size = Preprocessing(resize_size=8, crop_size=8)
    register_backbone("reads values", ReadsValues, preprocessing=size)
    backbone = load_backbone("reads values")
    assert layer_widths(backbone, ["body", "penultimate"], 2, size) == (24, 6)
    with pytest.raises(ValueError, match="does not support images of 2 x 2 pixels"):
        layer_widths(backbone, ["body"], 2, Preprocessing(2, 2))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("It is small.\nSee above."), "It is small."),
        (AssertionError("It must be even."), "It must be even."),
        (AssertionError(), "AssertionError."),
    ],
)
def test_errors_of_a_forward_pass_are_about_the_image_size(error, line):
    message = re.escape(f"support images of 7 x 7 pixels: {line} Choose another")
    with pytest.raises(ValueError, match=message), reraise_invalid_size(7):
        raise error


def test_widths_of_missing_layers_raise():
    backbone = load_backbone("resnet_mini")
    with pytest.raises(ValueError, match="Got 'stage9' instead"):
        layer_widths(backbone, ["stage9"], "avg", backbone.preprocessing)


@pytest.mark.slow
def test_widths_of_invalid_layers_raise():
    size = load_backbone("resnet_mini").preprocessing
    swin = load_backbone("swin_v2_t", None)
    with pytest.raises(ValueError, match="must return one row per image"):
        layer_widths(swin, ["features.1.0.attn.cpb_mlp"], "flatten", size)


def small_vit():
    return VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=3).eval()


@pytest.fixture(scope="module")
def vit():
    register_backbone("small_vit", small_vit, preprocessing=Preprocessing(32, 32))
    return load_backbone("small_vit")


@pytest.mark.parametrize("layer", ["encoder.layers.encoder_layer_0", "encoder"])
def test_class_token_and_patches_of_a_transformer(vit, layer):
    x = torch.randn(2, 3, 32, 32)
    plain = small_vit()
    plain.load_state_dict(vit.network.state_dict())
    reference = create_feature_extractor(plain, [layer])
    with torch.inference_mode():
        tokens = reference(x)[layer]  # (2, 17, 16)
    assert_close = torch.testing.assert_close
    assert_close(extract(vit, [layer], "cls", x), tokens[:, 0])
    assert_close(extract(vit, [layer], "avg", x), tokens[:, 1:].mean(1))
    assert_close(extract(vit, [layer], "max", x), tokens[:, 1:].amax(1))
    assert_close(extract(vit, [layer], "flatten", x), tokens.flatten(1))
    maps = tokens[:, 1:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
    assert_close(extract(vit, [layer], 4, x), maps.flatten(1))


def test_penultimate_features_of_a_transformer_are_its_class_token(vit):
    x = torch.randn(2, 3, 32, 32)
    both = extract(vit, ["penultimate", "encoder.ln"], "cls", x)
    torch.testing.assert_close(both[:, :16], both[:, 16:])


def test_pooling_that_a_layer_of_a_transformer_does_not_support(vit):
    size = vit.preprocessing
    assert layer_widths(vit, ["encoder", "conv_proj"], 2, size) == (64, 64)
    with pytest.raises(ValueError, match=r"'conv_proj', with .* 4, 4\)"):
        layer_widths(vit, ["encoder", "conv_proj"], "cls", size)
    with pytest.warns(UserWarning, match="'encoder', which has 4 x 4 positions"):
        layer_widths(vit, ["encoder"], 5, size)


def test_a_grid_larger_than_a_layer_warns_once():
    backbone = load_backbone("resnet_mini")
    given = (["stage2", "stage4", "penultimate"], 6, backbone.preprocessing)
    match = r"pooling=6 .* layer 'stage4', which has 5 x 5 positions .* at most 5"
    with pytest.warns(UserWarning, match=match) as caught:
        widths = layer_widths(backbone, *given)
    assert widths == (64 * 36, 256 * 36, 256)
    assert len(caught) == 1
    assert layer_widths(backbone, *given) == widths  # and no second warning
    layer_widths(backbone, ["stage4"], 5, backbone.preprocessing)


class Swinlike(nn.Module):
    """A network with stages whose maps are (n, h, w, c), except for the first one."""

    def __init__(self, side=None):
        super().__init__()
        self.side = side  # None: any
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.block = nn.Sequential(nn.Linear(16, 7), nn.GELU())
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        if self.side is not None:
            assert x.shape[2:] == (self.side, self.side)
        return self.head(self.block(self.norm(self.embed(x).permute(0, 2, 3, 1)))).mean(
            (1, 2)
        )


@pytest.mark.parametrize("side", [None, 24])
@pytest.mark.parametrize("layer", ["embed", "norm", "block", "penultimate", "head"])
def test_channels_last_maps_of_a_registered_network(side, layer):
    size = Preprocessing(resize_size=24, crop_size=24)
    # Where the network supports one size only, nothing can be measured.
    layout = None if side is None else "NHWC"
    register_backbone(
        "swinlike", lambda: Swinlike(side), preprocessing=size, layout=layout
    )
    backbone = load_backbone("swinlike")
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    network = backbone.network
    with torch.inference_mode():
        embedded = network.embed(x).permute(0, 2, 3, 1)
        blocks = network.block(network.norm(embedded))
    maps = {"embed": embedded, "norm": network.norm(embedded), "block": blocks}
    maps |= {"penultimate": blocks, "head": network.head(blocks)}
    values = maps[layer].detach().numpy().astype(np.float64)  # (n, 6, 6, c)
    cells = values.reshape(2, 2, 3, 2, 3, -1).mean((2, 4))  # (n, 2, 2, c)
    expected = {
        "avg": values.mean((1, 2)),
        "max": values.max((1, 2)),
        "gem": (values.clip(1e-6) ** 3).mean((1, 2)) ** (1 / 3),
        "flatten": values.transpose(0, 3, 1, 2).reshape(2, -1),
        2: cells.transpose(0, 3, 1, 2).reshape(2, -1),
    }
    for pooling, rows in expected.items():
        got = extract(backbone, [layer], pooling, x).numpy()
        np.testing.assert_allclose(got, rows, rtol=1e-4, atol=1e-6, err_msg=pooling)
        assert layer_widths(backbone, [layer], pooling, size) == (rows.shape[1],)


class ChannelsLastStages(nn.Module):
    """A network with stages that pass (n, h, w, c)."""

    def __init__(self):
        super().__init__()
        to_last = Permute([0, 2, 3, 1])
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, 8, 4, 4), to_last), nn.Linear(8, 6)]
        )
        mean = Permute([0, 3, 1, 2]), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Sequential(*mean, nn.Linear(6, 5))

    def forward(self, x):
        return self.head(self.stages[1](self.stages[0](x)))


def test_stages_of_channels_last_maps():
    size = Preprocessing(resize_size=32, crop_size=32)
    register_backbone("stages last", ChannelsLastStages, preprocessing=size)
    backbone = load_backbone("stages last")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stem = backbone.network.stages[0](x)
        expected = [stem.mean((1, 2)), backbone.network.stages[1](stem).mean((1, 2))]
    got = extract(backbone, ["stem", "stage1"], "avg", x)
    torch.testing.assert_close(got, torch.cat(expected, dim=1))


class FixedGrid(nn.Module):
    """Its maps have 4 x 4 positions for every size of the images."""

    def __init__(self):
        super().__init__()
        self.grid = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(4))
        self.scale, self.head = nn.Identity(), nn.Linear(6, 5)

    def forward(self, x):
        x = self.scale(self.grid(x).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))


def test_axes_that_cannot_be_measured_are_declared():
    size = Preprocessing(resize_size=16, crop_size=16)
    register_backbone("fixed grid", FixedGrid, preprocessing=size)
    backbone = load_backbone("fixed grid")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    message = r"'scale' of 'fixed grid' .* \(4, 4, 6\) per image .* Pass layout='NCHW'"
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(backbone, ["scale"], "avg")
    with pytest.raises(ValueError, match=message):
        layer_widths(backbone, ["scale"], "avg", size)
    assert extract(backbone, ["grid"], "avg", x).shape == (2, 6)

    register_backbone("fixed grid", FixedGrid, preprocessing=size, layout="NHWC")
    declared = load_backbone("fixed grid")
    assert declared.digest != backbone.digest
    got = extract(declared, ["scale"], "avg", x)
    torch.testing.assert_close(got, extract(declared, ["grid"], "avg", x))
    register_backbone("fixed grid", FixedGrid, preprocessing=size, layout="NCHW")
    assert extract(load_backbone("fixed grid"), ["scale"], "avg", x).shape == (2, 4)


def test_axes_of_a_network_that_reads_values():
    size = Preprocessing(resize_size=8, crop_size=8)
    register_backbone("reads values", ReadsValues, preprocessing=size)
    backbone = load_backbone("reads values")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert extract(backbone, ["body"], "avg", x).shape == (2, 6)
