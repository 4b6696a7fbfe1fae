"""Stages, neck and head of networks of timm."""

import pytest
import torch
from torch import nn

from sktl._backbones import registered, timm_structure
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.new_head import WHOLE_NETWORK, replace_head, stage_names
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._backbones.source import NetworkStructure
from sktl._backbones.stages import last_linear, split_into_stages
from sktl._backbones.traced_blocks import Block
from sktl._images.preprocessing import Preprocessing

timm = pytest.importorskip("timm")


def create(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, **options)
    return network.eval().requires_grad_(False)


def describe_network(network: nn.Module) -> NetworkStructure:
    own = Preprocessing.from_timm(network.pretrained_cfg)
    return timm_structure.describe_network(network, own)


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


@pytest.mark.slow
def test_distilled_networks_and_those_without_head():
    distilled = create("deit_tiny_distilled_patch16_224", depth=4, embed_dim=48)
    structure = describe_network(distilled)
    assert structure.reason_not_staged is None
    assert structure.n_prefix_tokens("stage4") == 2
    headless = create("test_vit", num_classes=0)
    assert last_linear(headless, describe_network(headless)) is None
    x = torch.randn(1, 3, 224, 224)
    parts = split_into_stages(structure, 224)
    for stage in parts.stages.values():
        x = stage(x)
    assert parts.neck(x).shape == (1, 48)


@pytest.mark.parametrize(
    ("name", "options", "n_prefix"),
    [
        ("test_vit", {"reg_tokens": 2, "embed_dim": 48}, 3),
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 48}, 2),
        ("vit_small_patch16_dinov3", {"embed_dim": 96}, 5),
    ],
)
def test_class_token_is_the_first(name, options, n_prefix):
    network = create(name, depth=4, **options)
    network.cls_token.fill_(100)
    structure = describe_network(network)
    stem = split_into_stages(structure, 224).stages["stem"]
    tokens = stem(torch.randn(1, 3, 224, 224))[0]
    assert structure.has_class_token
    assert structure.n_prefix_tokens("stem") == n_prefix
    assert (tokens.mean(1) > 50).nonzero().tolist() == [[0]]


@pytest.mark.slow
def test_registers_are_no_class_token():
    backbone = load_backbone("timm/test_vit2", None)
    x = torch.zeros(1, 3, 32, 32)
    for layer in ("stem", "stage4", "blocks.3", "penultimate"):
        with pytest.raises(ValueError, match="needs a layer with a class token"):
            FeatureExtractor(backbone, [layer], "cls")(x)
        assert FeatureExtractor(backbone, [layer], "avg")(x).shape == (1, 64)


@pytest.mark.parametrize(
    ("name", "options", "preprocessing"),
    [
        (
            "test_resnet",
            {"in_chans": 1},
            Preprocessing(64, 64, mean=(0.5,), std=(0.5,)),
        ),
        ("test_vit3", {"img_size": 96}, Preprocessing(96, 96)),
    ],
)
def test_networks_that_differ_from_their_configuration(name, options, preprocessing):
    network = create(name, **options)
    structure = timm_structure.describe_network(network, preprocessing)
    n_channels, side = preprocessing.n_channels, preprocessing.crop_size
    x = torch.randn(2, n_channels, side, side)
    expected = network.forward_features(x)
    for stage in split_into_stages(structure, side, n_channels).stages.values():
        x = stage(x)
    assert torch.allclose(x, expected, atol=1e-5)
    assert structure.has_fixed_image_size == (name == "test_vit3")


class TwoLayers(nn.Module):
    """Has the methods of networks of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 2)

    def between(self, x):
        return x

    def forward_features(self, x):
        return self.body(self.between(self.stem(x)))

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def reset_classifier(self, num_classes):
        self.fc = nn.Identity()


class BranchesOnTheSize(TwoLayers):
    def __init__(self, is_fixed: bool) -> None:
        super().__init__()
        self.is_fixed = is_fixed

    def between(self, x):
        if self.is_fixed and x.shape[2] != 64:
            raise ValueError("images of another size")
        return x * 2 if x.shape[2] > 100 else x


@pytest.mark.parametrize("is_fixed", [True, False])
def test_records_of_one_size_are_used_for_one_size_only(is_fixed):
    network = BranchesOnTheSize(is_fixed).eval().requires_grad_(False)
    structure = timm_structure.describe_network(network, Preprocessing(128, 128))
    assert structure.has_fixed_image_size == is_fixed
    if not is_fixed:
        assert "depends on the size of the images" in str(structure.reason_not_staged)
        return
    x = torch.randn(1, 3, 128, 128)
    stem, stage1 = split_into_stages(structure, 128).stages.values()
    assert torch.equal(stage1(stem(x)), network.forward_features(x))


class BranchesOnTheMode(TwoLayers):
    def between(self, x):
        return x * 2 if self.training else x


class Drops(TwoLayers):
    def between(self, x):
        return nn.functional.dropout(x, 0.5, training=self.training)


def test_stages_are_correct_in_training():
    x, preprocessing = torch.randn(1, 3, 128, 128), Preprocessing(128, 128)
    structure = timm_structure.describe_network(
        BranchesOnTheMode().eval(), preprocessing
    )
    assert "depends on the mode" in str(structure.reason_not_staged)
    network = Drops().eval()
    structure = timm_structure.describe_network(network, preprocessing)
    stages = split_into_stages(structure, 128).stages.values()
    outputs = []
    for each in (network.train().forward_features, nn.Sequential(*stages).train()):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], network.eval().forward_features(x))


@pytest.mark.parametrize("global_pool", ["token", "avg", "map"])
@pytest.mark.slow
def test_penultimate_features_may_not_be_the_class_token(global_pool, monkeypatch):
    monkeypatch.setattr(registered, "registrations", {})
    register_backbone(
        "mine",
        lambda: create("test_vit", global_pool=global_pool, dynamic_img_size=True),
        preprocessing=Preprocessing(32, 32),
    )
    backbone = load_backbone("mine")
    x = torch.randn(1, 3, 32, 32)
    if global_pool == "token":
        got = FeatureExtractor(backbone, ["penultimate"], "cls")(x)
        assert torch.allclose(got, backbone.network.forward_features(x)[:, 0])
    else:
        with pytest.raises(ValueError, match="Got 'penultimate' of 'mine', whose"):
            FeatureExtractor(backbone, ["penultimate"], "cls")
    # The class token of the last block is available in each.
    assert FeatureExtractor(backbone, ["stage4"], "cls")(x).shape == (1, 64)


@pytest.mark.slow
def test_positions_belong_to_the_stem():
    # They have half as many parameters as a block.
    with torch.device("meta"):
        network = create("vit_tiny_patch16_224", img_size=512, dynamic_img_size=True)
    stages = split_into_stages(describe_network(network), 512).stages.values()
    blocks = set(network.blocks)
    per_stage = [len(blocks & set(stage.modules())) for stage in stages]
    assert per_stage == [0, 3, 3, 3, 3]


def test_last_linear_layer_is_that_of_the_classifier():
    # The head of this network has another linear layer, below the features.
    network = create("test_vit2", global_pool="map")
    assert last_linear(network, describe_network(network)) == "head"


@pytest.mark.slow
def test_layers_have_layouts():
    network = create("test_convnext")
    structure = describe_network(network)
    assert structure.is_channels_last("stages.0.blocks.0.conv_dw") is False
    assert structure.is_channels_last("stage1") is False
    transformer = describe_network(create("test_vit", dynamic_img_size=True))
    assert transformer.is_channels_last("patch_embed") is True
    assert transformer.n_prefix_tokens("blocks.0") == 1
    assert transformer.n_prefix_tokens("patch_embed") == 0


def test_a_network_that_cannot_be_cut(monkeypatch):
    def fail(*args, training):
        raise TypeError("it depends on the size")

    monkeypatch.setattr(timm_structure, "record", fail)
    backbone = load_backbone("timm/test_resnet", None, random_state=71)
    assert "ResNet cannot be cut: it depends" in backbone.reason_without_stages
    x = torch.randn(1, 3, 96, 96)
    network = backbone.network
    expected = network.forward_head(network.forward_features(x), pre_logits=True)
    assert torch.equal(backbone.neck(x), expected)
    own = {p for n, p in network.named_parameters() if not n.startswith("fc.")}
    assert set(backbone.neck.parameters()) == own
    assert last_linear(network, backbone.structure) == "fc"
    trained = replace_head(backbone, 3).eval()
    assert stage_names(trained) == [WHOLE_NETWORK]
    assert trained(x).shape == (1, 3)


def test_layers_of_a_network_that_cannot_be_cut_run_once(monkeypatch):
    monkeypatch.setattr(timm_structure, "record", None)
    backbone = load_backbone("timm/test_resnet", None, random_state=72)
    x = torch.randn(2, 3, 96, 96)
    network = backbone.network
    features = network.forward_head(network.forward_features(x), pre_logits=True)
    for layer, n_runs in [("layer3", 1), ("fc", 2)]:
        extractor = FeatureExtractor(backbone, ["penultimate", layer], "avg").eval()
        calls = []
        for module in extractor.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == 3:
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        alone = FeatureExtractor(backbone, [layer], "avg").eval()(x)
        assert torch.equal(extractor(x), torch.cat([features, alone], 1))
        assert len(calls) == n_runs


@pytest.mark.slow
def test_blocks_with_other_features_are_refused(monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return x + 1

    def neck_and_head(on_meta, outputs):
        return [Block(Wrong(), "NC", 0, outputs)], []

    monkeypatch.setattr(timm_structure, "_neck_and_head", neck_and_head)
    structure = describe_network(create("test_resnet"))
    assert "do not have the features" in str(structure.reason_not_staged)
