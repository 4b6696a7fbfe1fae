"""Tests of sktl._backbones.source."""

from pathlib import Path

import pytest

from sktl._backbones import bundled, registered, torchvision
from sktl._backbones.registry import load_backbone
from sktl._backbones.source import BackboneSource, weights_path
from sktl._backbones.weights import skip_weight_allocation


@pytest.mark.slow
def test_sources_tell_whether_the_image_size_is_fixed() -> None:
    for name in ("vit_b_32", "maxvit_t", "swin_t", "resnet_mini"):
        definition = load_backbone(name, None).definition
        with skip_weight_allocation():
            structure = definition.describe(definition.build(None))
        is_fixed = definition.has_fixed_image_size
        assert structure.has_fixed_image_size == (name == "maxvit_t")
        assert is_fixed == (None if name == "vit_b_32" else name == "maxvit_t")


@pytest.mark.parametrize("source", [bundled, torchvision, registered])
def test_sources_resolve_their_names(source: BackboneSource) -> None:
    for name in sorted(source.names())[:3]:
        definition = source.resolve(name, None, False)
        assert definition.file is None
        assert definition.is_registered == (source is registered)
        assert definition.preprocessing.crop_size >= definition.min_size


def test_paths_of_weights() -> None:
    assert weights_path("a", Path("b/c"), ["V1"]) == str(Path("b/c"))
    assert weights_path("a", "b.pth", ["V1"]) == "b.pth"
    with pytest.raises(ValueError, match=r"'a' has the weights V1, V2; .* Got 'V3'"):
        weights_path("a", "V3", ["V1", "V2"])
    with pytest.raises(TypeError, match=r"must be a str, a path or None. Got 3"):
        weights_path("a", 3, ["V1"])  # type: ignore[arg-type]
