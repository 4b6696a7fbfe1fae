"""Tests of sktl._backbones.register."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from sktl._backbones import registered, registry
from sktl._backbones.feature_extractor import FeatureExtractor
from sktl._backbones.new_head import replace_head
from sktl._backbones.register import register_backbone
from sktl._backbones.registry import load_backbone
from sktl._images.preprocessing import Preprocessing
from sktl._utils.keyed_cache import KeyedCache

_SMALL = Preprocessing(resize_size=32, crop_size=32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without cached or registered backbones."""
    monkeypatch.setattr(registered, "registrations", {})
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
        ({"n_prefix_tokens": -1}, ValueError, "an int of at least 0. Got -1"),
        ({"n_prefix_tokens": "1"}, ValueError, "an int of at least 0. Got '1'"),
        ({"head": ["fc"]}, ValueError, "passed together. Got only head"),
        ({"stages": {"stem": ["fc"]}}, ValueError, "passed together. Got only stages"),
        ({"stages": [["fc"]], "head": ["fc"]}, TypeError, "stages must be a dict"),
        ({"stages": {}, "head": ["fc"]}, TypeError, "stages must be a dict"),
        (
            {"stages": {"a": "fc"}, "head": ["fc"]},
            TypeError,
            r"stages\['a'\] must be a",
        ),
        ({"stages": {"a": [3]}, "head": ["fc"]}, TypeError, r"stages\['a'\] must be a"),
        ({"stages": {"a": ["conv1"]}, "head": []}, TypeError, "head must be a list"),
        ({"stages": {"head": ["fc"]}, "head": ["fc"]}, ValueError, "must be one word"),
        ({"stages": {"a": ["layer5"]}, "head": ["fc"]}, ValueError, "mean layer4 or"),
    ],
)
def test_invalid_backbones_raise(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    given = {"name": "mine", "builder": _resnet10, "preprocessing": _SMALL, **arguments}
    with pytest.raises(error, match=message):  # noqa: PT012
        register_backbone(**given)  # type: ignore[arg-type]
        load_backbone("mine")


_STAGES = {
    "stem": ["conv1", "bn1", "relu"],
    "low": ["maxpool", "layer1", "layer2"],
    "high": ["layer3", "layer4"],
}
_HEAD = ["avgpool", nn.Flatten(1), "fc"]


def _register(stages: Any = _STAGES, head: Any = _HEAD) -> None:
    register_backbone("mine", _resnet10, preprocessing=_SMALL, stages=stages, head=head)


def test_stages_by_names_of_modules() -> None:
    _register()
    backbone = load_backbone("mine")
    plain = _resnet10().eval()
    plain.load_state_dict(backbone.network.state_dict())  # the names are unchanged
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    low = nn.Sequential(plain.maxpool, plain.layer1, plain.layer2)
    expected = low(plain.relu(plain.bn1(plain.conv1(x))))
    assert list(backbone.stages) == ["stem", "low", "high"]
    with torch.inference_mode():
        got = backbone.stages["low"](backbone.stages["stem"](x))
        torch.testing.assert_close(got, expected)
        features = plain.avgpool(plain.layer4(plain.layer3(expected))).flatten(1)
        torch.testing.assert_close(replace_head(backbone, 3).eval()[:-1](x), features)
    assert backbone.penultimate == "fc"


def test_a_state_dict_is_loaded_by_the_names_of_the_network(tmp_path: Path) -> None:
    source = _resnet10().eval()
    torch.save(source.state_dict(), tmp_path / "net.pth")
    _register()
    backbone = load_backbone("mine", tmp_path / "net.pth")
    assert torch.equal(backbone.network.fc.weight, source.fc.weight)
    assert torch.equal(
        backbone.stages["low"][1][0].conv1.weight, source.layer1[0].conv1.weight
    )


def test_the_digest_depends_on_the_stages() -> None:
    digests = set()
    for stages in (None, _STAGES, {"stem": list(itertools.chain(*_STAGES.values()))}):
        _register(stages, None if stages is None else _HEAD)
        digests.add(load_backbone("mine").digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("stages", "head", "message"),
    [
        ({"stem": ["conv1", "bn1"]}, _HEAD, "after 'bn1' 'maxpool', .* runs 'relu'"),
        (
            {},
            ["avgpool", "fc"],
            r"'fc' with the shape \(2, 512, 1, 1\) instead of \(2, 5",
        ),
        ({}, ["avgpool", "Flatten()"], "after 'avgpool' no other module, .*runs 'fc'"),
        ({}, [nn.AdaptiveMaxPool2d(1), *_HEAD[1:]], "runs 'avgpool'"),
        ({}, [*_HEAD, nn.ReLU()], "the output with other values, after 'fc'"),
        (
            {},
            ["avgpool", nn.Flatten(1), nn.Tanh(), "fc"],
            "'fc' with other values, after",
        ),
        ({}, [nn.Flatten(9), *_HEAD], "an error after 'layer4.0.relu'"),
    ],
)
def test_the_error_names_the_first_difference(
    stages: Any, head: Any, message: str
) -> None:
    _register({**_STAGES, **stages}, head)
    with pytest.raises(ValueError, match=message):
        load_backbone("mine")


def test_registering_again_imports_the_builder_again() -> None:
    _register(None, None)
    first = load_backbone("mine")
    assert load_backbone("mine") is first
    _register(None, None)
    assert load_backbone("mine") is not first


class _Tokens(nn.Module):
    """A class token, and one token for each of four patches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 16, stride=16)
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.norm = nn.Identity()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv(x).flatten(2).transpose(1, 2)  # (n, 4, 4)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        return self.fc(self.norm(tokens)[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("pooling", "n"), [("avg", 1), ("cls", 1), ("avg", 0)])
def test_prefix_tokens_are_not_averaged_with_patches(pooling: str, n: int) -> None:
    register_backbone("mine", _Tokens, preprocessing=_SMALL, n_prefix_tokens=n)
    backbone = load_backbone("mine")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = FeatureExtractor(backbone, ["norm"], pooling)(x)
        patches = backbone.network.conv(x).mean((2, 3))
    expected = {"avg": (4 * patches + 1) / 5 if n == 0 else patches}
    torch.testing.assert_close(got, expected.get(pooling, torch.ones(2, 4)))
