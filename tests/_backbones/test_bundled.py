"""Tests of sktl._backbones.bundled."""

import pytest

from sktl._backbones import bundled
from sktl._backbones.registry import load_backbone


def test_the_bundled_backbone_has_no_other_names() -> None:
    assert bundled.names() == {"resnet_mini"}
    with pytest.raises(ValueError, match="'resnet_mini' has the weights DEFAULT; a pa"):
        load_backbone("resnet_mini", "IMAGENET1K_V1")


def test_random_weights_have_no_categories() -> None:
    assert bundled.resolve("resnet_mini", None, False).categories is None
    assert len(bundled.resolve("resnet_mini", "DEFAULT", False).categories or ()) == 200
