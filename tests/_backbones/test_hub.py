"""Tests of sktl._backbones.hub."""

import sys

import pytest

from sktl._backbones.hub import fetch_hub_file


def test_without_the_client_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'sktl\[timm\]'"):
        fetch_hub_file("timm/test_vit", "model.safetensors", None, progress=False)
