"""Tests of sktl._backbones.torchvision."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from sktl._backbones import torchvision
from sktl._backbones.torchvision import adapt_state_dict
from sktl._backbones.weights import load_weights_into, skip_weight_allocation


def test_old_names_of_densenet_are_renamed() -> None:
    with skip_weight_allocation():
        source, network = (models.DenseNet(4, (2, 1), 8, 2) for _ in range(2))
    source.to_empty(device="cpu")
    old = OrderedDict(
        (name.replace("norm1", "norm.1").replace("conv2", "conv.2"), value)
        for name, value in source.state_dict().items()
    )
    load_weights_into(network, adapt_state_dict(network, old), "they")
    name = "features.denseblock1.denselayer2.conv2.weight"
    assert name not in old
    assert (
        network.get_parameter(name).data_ptr() == source.get_parameter(name).data_ptr()
    )


def test_auxiliary_heads_are_omitted() -> None:
    layer = nn.Linear(3, 2)
    state_dict = {**layer.state_dict(), "aux1.w": torch.zeros(1)}
    assert set(adapt_state_dict(layer, state_dict)) == {"weight", "bias"}
    own = nn.ModuleDict({"aux1": layer})
    assert adapt_state_dict(own, own.state_dict()).keys() == own.state_dict().keys()


def test_names_and_definitions() -> None:
    assert torchvision.names() == set(models.list_models(module=models))
    definition = torchvision.resolve("vit_b_16", None, False)
    assert (definition.file, definition.categories) == (None, None)
    assert (definition.preprocessing.crop_size, definition.min_size) == (224, 1)


def test_weights_that_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torchvision, "fetch_weights")
    swag = "IMAGENET1K_SWAG_E2E_V1"
    definition = torchvision.resolve("vit_b_16", swag, False, fetch=False)
    assert (definition.weights_name, definition.file) == (swag, None)
    assert definition.preprocessing.crop_size == 384
    assert "SWAG" in (definition.license or "")
    assert len(definition.categories or ()) == 1000
    assert {"DEFAULT", "IMAGENET1K_V1", swag} <= set(definition.known_weights)


@pytest.mark.parametrize(("file", "known"), [("w.pth", False), ("{}", True)])
def test_license_of_a_file(file: str, known: bool) -> None:
    url = models.RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_LINEAR_V1.url
    path = file.format(url.rpartition("/")[2])
    definition = torchvision.resolve("regnet_y_16gf", path, False)
    assert (definition.license is not None) == known


def test_subclasses_keep_the_layout_but_have_no_stages() -> None:
    class Changed(models.ConvNeXt):
        """A subclass may do something else in forward."""

    with skip_weight_allocation():
        network = Changed([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)])
    structure = torchvision.describe_network(network)
    assert structure.reason_not_staged is not None
    assert structure.is_channels_last("features.1.0.block.3")
    assert not structure.is_channels_last("features.1.0.block.0")
