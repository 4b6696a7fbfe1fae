"""Tests of sktl._backbones.vision_transformer."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from sktl._backbones.stages import split_into_stages
from sktl._backbones.torchvision import adapt_state_dict, describe_network
from sktl._backbones.unwrap import StateDict
from sktl._backbones.vision_transformer import patch_size, support_other_sizes
from sktl._backbones.weights import load_weights_into

_PATCH = 8


def _plain(side: int = 32) -> models.VisionTransformer:
    network = models.VisionTransformer(side, _PATCH, 4, 2, 16, 24, num_classes=3)
    generator = torch.Generator().manual_seed(side)
    for name in ("class_token", "encoder.pos_embedding", "heads.head.weight"):
        nn.init.normal_(network.get_parameter(name), generator=generator)
    return network.eval()


def _at(side: int, state_dict: StateDict) -> models.VisionTransformer:
    """Return torchvision's network for a size, as torchvision documents it."""
    network = _plain(side)
    network.load_state_dict(interpolate_embeddings(side, _PATCH, dict(state_dict)))
    return network


def _images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [8, 24, 32, 48])
@torch.inference_mode()
def test_outputs_are_those_of_torchvision_at_each_size(side: int) -> None:
    plain = _plain()
    network = support_other_sizes(copy.deepcopy(plain))
    assert isinstance(network, models.VisionTransformer)
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert str(network) == str(plain)  # it is part of digests
    x, expected = _images(side), _at(side, plain.state_dict())
    assert torch.equal(network(x), expected(x))
    parts = split_into_stages(describe_network(network), 32)
    torch.testing.assert_close(parts(x), expected(x))
    tokens = x
    for stage in parts.stages.values():
        tokens = stage(tokens)
    assert tokens.shape == (2, 1 + (side // _PATCH) ** 2, 16)


def test_sizes_of_a_class_of_torchvision() -> None:
    class Changed(models.VisionTransformer):
        """A subclass may do something else in forward."""

    subclass = support_other_sizes(Changed(32, 8, 1, 2, 16, 24))
    assert type(subclass) is Changed
    assert patch_size(subclass) is patch_size(nn.Identity()) is None
    assert describe_network(subclass).has_fixed_image_size
    other = _plain()
    other.encoder = nn.Identity()
    assert patch_size(support_other_sizes(other)) is None
    structure = describe_network(support_other_sizes(_plain()))
    assert not structure.has_fixed_image_size
    assert structure.side_multiple == _PATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.inference_mode()
def test_weights_of_another_size_are_interpolated_once(dtype: torch.dtype) -> None:
    # To 32 pixels and back to 48, positions would be lost.
    file = {name: v.to(dtype) for name, v in _plain(48).state_dict().items()}
    network = support_other_sizes(_plain(32))
    load_weights_into(network, adapt_state_dict(network, file), "they")
    assert all(v.dtype == torch.float32 for v in network.state_dict().values())
    parts = split_into_stages(describe_network(network), 32)
    for side in (32, 48, 64):
        exact = {name: value.float() for name, value in file.items()}
        expected = _at(side, exact)(_images(side))
        torch.testing.assert_close(network(_images(side)), expected)
        torch.testing.assert_close(parts(_images(side)), expected)
    # Blocks alone, as in a fine-tuned network, are loaded in the same way.
    stem = copy.deepcopy(parts.stages["stem"])
    smaller = split_into_stages(describe_network(_plain(32)), 32).stages["stem"]
    load_weights_into(smaller, stem.state_dict(), "they")
    assert torch.equal(smaller(_images(48)), stem(_images(48)))


@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (1, 26, 8), (2, 26, 16), (26, 16), (1, 1 + 129**2, 16)]
)
def test_invalid_positions_are_refused(shape: tuple[int, ...]) -> None:
    network = support_other_sizes(_plain())
    # One value in memory: the shape alone must not decide how much is allocated.
    positions = torch.zeros(1).expand(shape)
    state = {**network.state_dict(), "encoder.pos_embedding": positions}
    adapted = adapt_state_dict(network, state)
    assert adapted["encoder.pos_embedding"] is positions
    with pytest.raises(ValueError, match=r"of another shape \(encoder.pos_embedding"):
        load_weights_into(network, adapted, "they")


def test_gradients_reach_the_positions_of_the_weights() -> None:
    network = support_other_sizes(_plain())
    network(_images(48)).sum().backward()
    gradient = network.get_parameter("encoder.pos_embedding").grad
    assert gradient is not None
    assert gradient.shape == (1, 17, 16)
    assert gradient.ne(0).any(2).all()
