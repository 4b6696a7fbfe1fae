"""Tests of sktl._backbones.registered."""

import pytest
import torch
from torch import nn
from torchvision import models

from sktl._backbones import registered, timm_structure
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.register import register_backbone
from sktl._backbones.registration import Registration, portable_builder
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(registered, "registrations", {})
    return monkeypatch


@pytest.fixture
def layer(fresh: pytest.MonkeyPatch) -> nn.Linear:
    layer = nn.Linear(3, 2)
    builder = portable_builder("mine", lambda: layer)
    registered.add(Registration("mine", builder, Preprocessing(8, 8), ("a", "b")))
    return layer


def test_the_network_is_a_copy(layer: nn.Linear) -> None:
    assert list(registered.names()) == ["mine"]
    definition = registered.resolve("mine", "DEFAULT", False)
    network = definition.build(None)
    assert network is not layer
    assert torch.equal(network.weight, layer.weight)
    assert (definition.file, definition.categories) == (None, ("a", "b"))


def test_a_path_is_the_weights_file(layer: nn.Linear) -> None:
    assert registered.resolve("mine", "net.pth", False).file == "net.pth"
    with pytest.raises(ValueError, match="has the weights DEFAULT; a path ends"):
        registered.resolve("mine", "V1", False)


# The first one has attributes `stages` and `head`, and its stem is in neither.
@pytest.mark.parametrize(
    "name", ["test_convnext", pytest.param("test_resnet", marks=pytest.mark.slow)]
)
def test_networks_of_timm_have_the_stages_of_timm(
    name: str, fresh: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    register_backbone(
        "mine",
        lambda: timm.create_model(name, num_classes=3),
        preprocessing=Preprocessing(64, 64),
    )
    stages = load_backbone("mine").stages
    expected = load_backbone(f"timm/{name}", None).stages
    assert list(stages) == list(expected)
    for name, stage in stages.items():
        assert str(stage) == str(expected[name])


@pytest.mark.parametrize("n_prefix_tokens", [0, 1])
@pytest.mark.slow
def test_declared_tokens_start_with_the_class_token(
    n_prefix_tokens: int, fresh: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    register_backbone(
        "mine",
        lambda: timm.create_model("test_vit2"),  # with a register only
        preprocessing=Preprocessing(32, 32),
        n_prefix_tokens=n_prefix_tokens,
    )
    structure = load_backbone("mine").structure
    assert structure.n_prefix_tokens("stage1") == 1
    assert structure.has_class_token == (n_prefix_tokens == 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit", r"multiple of 16 .* 80 or 96\."),
        ("test_vit3", "supports only images of 160 pixels"),
    ],
)
@pytest.mark.slow
def test_transformers_of_timm_refuse_sizes_they_do_not_support(
    name: str, message: str, fresh: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    preprocessing = Preprocessing(160, 160)
    register_backbone(
        "mine", lambda: timm.create_model(name), preprocessing=preprocessing
    )
    backbone = load_backbone("mine")
    assert list(backbone.stages) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    with pytest.raises(ValueError, match=message):
        backbone.preprocessing_at(90)


def _features(layer: str) -> torch.Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        extracted: torch.Tensor = FeatureExtractor(
            load_backbone("mine"), [layer], "avg"
        )(x)
    return extracted


# A stage ends with a module of the network, or with another one.
@pytest.mark.parametrize("last", [[], [nn.Identity()]])
def test_declared_stages_have_the_axes_of_their_modules(
    last: list[nn.Module], fresh: pytest.MonkeyPatch
) -> None:
    register_backbone(
        "mine",
        lambda: models.SwinTransformer([4, 4], 12, [1, 1], [1, 1], [2, 2]),
        preprocessing=Preprocessing(32, 32),
        stages={
            "stem": ["features.0"],
            "stage1": ["features.1", *last],
            "stage2": ["features.2", "features.3", *last],
        },
        head=["norm", "permute", "avgpool", "flatten", "head"],
    )
    for layer, module in [("stage1", "features.1"), ("stage2", "features.3")]:
        torch.testing.assert_close(_features(layer), _features(module))
        assert _features(layer).shape == (2, 12 * int(layer[-1]))


def test_networks_of_timm_with_declared_stages_are_not_recorded(
    fresh: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm")
    fresh.setattr(timm_structure, "describe_network", None)
    stages = {f"stage{i}": [f"layer{i}"] for i in range(1, 5)}
    register_backbone(
        "mine",
        lambda: timm.create_model("test_resnet"),
        preprocessing=Preprocessing(32, 32),
        stages={"stem": ["conv1", "bn1", "act1", "maxpool"], **stages},
        head=["global_pool", "fc"],
    )
    torch.testing.assert_close(_features("stage2"), _features("layer2"))
