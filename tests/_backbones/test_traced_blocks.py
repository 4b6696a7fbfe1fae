"""Cutting of recorded steps into blocks that pass one tensor."""

import copy
import functools
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from sktl._backbones.steps import Ref, Step
from sktl._backbones.traced import MetaNetwork, record
from sktl._backbones.traced_blocks import TracedBlock, cut, layout_of


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def embedding(self, shape: list[int]) -> torch.Tensor:
        return self.scale * torch.arange(math.prod(shape))[:, None]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], self.linear(x[:, 1:]) + rotary], 1)


class Transformer(nn.Module):
    """Blocks share positions that depend on the sides of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.rotary = Rotary()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        n, _, height, width = x.shape
        rotary = self.rotary.embedding([height, width])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, rotary=rotary)
        return self.norm(x)


def blocks_of(network):
    images = [torch.empty(n, 3, 16 * n, 16 * n, device="meta") for n in (2, 3)]
    return cut(network, record(MetaNetwork(network), lambda n, x: n(x), tuple(images)))


@pytest.mark.parametrize("side", [16, 40])
def test_blocks_are_the_network(side):
    network = Transformer()
    blocks = blocks_of(network)
    assert [block.layout for block in blocks[:2]] == ["NCHW", "NLC"]
    assert [block.n_prefix for block in blocks[-3:]] == [1, 1, 1]
    assert blocks[0].module is network.embed
    assert blocks[-1].module is network.norm
    x = torch.randn(5, 3, side, side)
    got = nn.Sequential(*(block.module for block in blocks))(x)
    assert torch.equal(got, network(x))


def test_blocks_share_parameters_also_when_copied_and_pickled():
    network = Transformer()
    parts = nn.Sequential(*(block.module for block in blocks_of(network)))
    assert set(parts.parameters()) == set(network.parameters())
    copied, copied_parts = copy.deepcopy((network, parts))
    assert set(copied_parts.parameters()) == set(copied.parameters())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(parts))(x), network(x))
    # Gradients reach all parameters.
    parts(x).sum().backward()
    assert network.rotary.scale.grad is not None


def test_printed_blocks_tell_the_steps():
    block = blocks_of(Transformer())[-2].module
    assert isinstance(block, TracedBlock)
    assert "module blocks_1.__call__(%0, rotary=%" in str(block)
    assert "0x" not in str(block)  # no address, which differs between processes


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.inner = nn.Sequential(nn.Identity())
        self.inner.register_buffer("saved", torch.ones(3, 1, 1))
        self.inner.register_buffer("constant", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.layer(x)) * self.inner.saved + self.inner.constant


def test_buffers_that_are_not_saved_are_not_saved_by_blocks():
    parts = nn.ModuleList(block.module for block in blocks_of(Buffers()))
    saved = {name.split(".")[-1] for name in parts.state_dict()}
    assert saved == {"weight", "bias", "inner_saved"}
    assert len(list(parts.buffers())) == 2


def test_results_are_released_after_their_last_use():
    results: list[weakref.ref[torch.Tensor]] = []
    n_alive: list[int] = []

    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        n_alive.append(sum(result() is not None for result in results))
        total = x + y
        results.append(weakref.ref(total))
        return total

    # The first result is used by the second and the third step.
    pairs = [(0, 0), (1, 1), (2, 1), (3, 3), (4, 4)]
    steps = [Step("function", add, (Ref(i), Ref(j))) for i, j in pairs]
    assert TracedBlock(nn.Identity(), steps, ())(torch.ones(1)).item() == 24
    assert n_alive == [0, 1, 2, 1, 1]


def test_printed_functions_have_no_address():
    steps = [
        Step("function", map, (lambda each: each, Ref(0))),
        Step("method", "register_hook", (Ref(0), functools.partial(max, 1))),
    ]
    text = str(TracedBlock(nn.Identity(), steps, ()))
    assert "<lambda>, %0)" in text
    assert "partial)" in text
    assert "0x" not in text


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return nn.functional.dropout(x, 0.5, training=self.training)


@pytest.mark.parametrize("training", [True, False])
def test_blocks_have_the_mode_in_which_they_run(training):
    network = Drops().eval()
    parts = nn.Sequential(*(block.module for block in blocks_of(network)))
    x = torch.randn(2, 3, 16, 16)
    outputs = []
    for each in (network.train(training), parts.train(training)):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    assert (outputs[0] == 0).any() == training


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return x + self.c(self.b(x))


def test_no_cut_beside_a_residual_connection():
    first, second = blocks_of(TwoPaths())
    assert isinstance(first.module, nn.Conv2d)
    assert len(list(second.module.children())) == 2


class AmbiguousNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_0, self.steps = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.a = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a[0](self.a_0(self.steps(x)))


def test_modules_with_similar_names_are_told_apart():
    network = AmbiguousNames()
    (block,) = blocks_of(network)
    assert set(block.module.parameters()) == set(network.parameters())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(block.module(x), network(x))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((2, 5, 7, 7), (3, 5, 14, 14), ("NCHW", 0)),
        ((2, 7, 7, 5), (3, 14, 14, 5), ("NHWC", 0)),
        ((2, 50, 5), (3, 197, 5), ("NLC", 1)),
        ((2, 49, 5), (3, 196, 5), ("NLC", 0)),
        ((2, 5), (3, 5), ("NC", 0)),
        ((2, 5, 49), (3, 5, 196), None),
        ((8, 5, 7, 7), (12, 5, 7, 7), None),  # windows of the images
        ((2, 4, 7, 5), (3, 4, 14, 5), None),
        ((2,), (3,), None),
    ],
)
def test_layout(first, second, expected):
    tensors = (torch.empty(first), torch.empty(second))
    assert layout_of(tensors, (2, 3)) == expected


def test_one_tensor_must_be_returned():
    network = nn.Identity()
    images = tuple(torch.empty(n, 3, 8, 8, device="meta") for n in (2, 3))
    with pytest.raises(TypeError, match="return one tensor"):
        cut(network, record(MetaNetwork(network), lambda n, x: (x, x), images))
