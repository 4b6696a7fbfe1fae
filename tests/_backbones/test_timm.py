"""Tests of sktl._backbones.timm."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sktl._backbones import registry
from sktl._backbones.registry import load_backbone
from sktl._utils.keyed_cache import KeyedCache

timm = pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "backbones", KeyedCache(max_size=4))


def _noise(side: int = 160) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _saved(folder: Path, state_dict: dict[str, Tensor]) -> Path:
    torch.save(state_dict, folder / "net.pth")
    return folder / "net.pth"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_networks_are_those_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = timm.create_model(name).eval()
    path = _saved(tmp_path, expected.state_dict())
    torch.manual_seed(4)
    before = torch.get_rng_state()
    for weights in (path, None):
        backbone = load_backbone(f"timm/{name}", weights, random_state=3)
        with torch.inference_mode():
            assert torch.equal(backbone.network(_noise()), expected(_noise()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/test_vitt", r"no backbone 'timm/test_vitt' .* mean timm/test_vit"),
        ("timm/test_vit.a1", r"no weights 'a1' for 'timm/test_vit'.* tags r160_in1k\."),
        ("timm/test_vit@", "revision must follow"),
        ("timm/tv_resnet50", r"mean timm/resnet50\.tv_in1k\?"),
        ("timm/test_coatnet", "has no pretrained weights .* Set weights=None"),
    ],
)
def test_invalid_names_raise(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(name)
    assert len(str(caught.value)) < 400


def test_without_timm_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'sktl\[timm\]'"):
        load_backbone("timm/test_vit2")


def test_weights_of_another_network_raise(tmp_path: Path) -> None:
    path = _saved(tmp_path, nn.Linear(3, 2).state_dict())
    for name in ("timm/test_vit", "timm/test_resnet"):
        with pytest.raises(ValueError, match=f"{name}' have other tensors: .* missing"):
            _ = load_backbone(name, path).network
