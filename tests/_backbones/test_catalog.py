"""Tests of sktl._backbones.catalog."""

import subprocess
import sys

import pytest
from torchvision import models

from sktl._backbones import registered, timm
from sktl._backbones.catalog import find_source, is_reserved, list_backbones
from sktl._backbones.register import register_backbone
from sktl._images.preprocessing import Preprocessing


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "registrations", {})


@pytest.mark.slow
def test_timm_is_imported_only_by_its_names() -> None:
    code = (
        "import contextlib, sys; from sktl import list_backbones\n"
        "from sktl._backbones.registry import load_backbone\n"
        "list_backbones('resnet*'); load_backbone('resnet_mini').network\n"
        "with contextlib.suppress(ValueError): load_backbone('resnet81')\n"
        "sys.exit('timm' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_timm_is_not_listed_without_a_pattern() -> None:
    assert list_backbones() == sorted(
        {"resnet_mini", *models.list_models(module=models)}
    )


def test_a_pattern_selects_names_of_all_sources() -> None:
    pytest.importorskip("timm")
    register_backbone("my_vit", models.alexnet, preprocessing=Preprocessing(64, 64))
    assert list_backbones("vit_b_*") == ["vit_b_16", "vit_b_32"]
    found = list_backbones("*vit*")
    assert {"my_vit", "vit_b_16", "timm/test_vit"} < set(found)
    assert found == sorted(found)
    assert all("vit" in name for name in found)
    assert list_backbones("timm/test_vit[23]") == ["timm/test_vit2", "timm/test_vit3"]


@pytest.mark.parametrize("pattern", ["timm/test_vit", "timm/test_vit.*_in1k"])
def test_pretrained_weights_of_timm_have_their_tags(pattern: str) -> None:
    pytest.importorskip("timm")
    names = list_backbones(pattern, pretrained=True)
    assert names == ["timm/test_vit.r160_in1k"]
    # timm has no weights of this architecture.
    assert list_backbones("timm/test_coatnet", pretrained=True) == []
    assert list_backbones("resnet_mini", pretrained=True) == ["resnet_mini"]


def test_without_timm_its_names_raise_and_others_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(timm, "is_installed", lambda: False)
    assert list_backbones("*resnet_mini*") == ["resnet_mini"]
    with pytest.raises(ImportError, match=r"pip install 'sktl\[timm\]'"):
        list_backbones("timm/*")
    with pytest.raises(ValueError, match="Do you mean squeezenet1_1 or"):
        find_source("squeezenet1.1")


def test_each_name_has_one_source() -> None:
    assert is_reserved("resnet18")
    assert is_reserved("resnet_mini")
    assert is_reserved("timm/anything")
    assert find_source("timm/anything") is timm
    assert not is_reserved("mine")
    register_backbone("mine", models.alexnet, preprocessing=Preprocessing(64, 64))
    assert not is_reserved("mine")
    assert find_source("mine") is registered


@pytest.mark.parametrize(
    ("name", "suggested"),
    [("resnet-18", "resnet18"), ("test_vit3", "timm/test_vit3"), (None, "")],
)
def test_unknown_names_raise_with_close_ones(name: str, suggested: str) -> None:
    if suggested.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"There is no backbone .*{suggested}") as info:
        find_source(name)
    assert len(str(info.value)) < 400
