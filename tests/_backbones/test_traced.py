"""Recording of a forward method as steps."""

import pytest
import torch
from torch import nn

from sktl._backbones.steps import Ref, Step
from sktl._backbones.traced import MetaNetwork, record


def branch_on_size(x: torch.Tensor) -> torch.Tensor:
    return x if x.shape[2] == 8 else x[:, :, :8]


class Network(nn.Module):
    """Has a module, a parameter, arithmetic, a function that branches, a method."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))
        self.scale = nn.Parameter(torch.full((4, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(4, 1, 1))

    def affine(self, x: torch.Tensor) -> torch.Tensor:
        return 1 - x * self.scale + self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.affine(self.layers(x))
        n, c, height, _ = x.shape
        return branch_on_size(x).reshape(n, c, -1)[..., : height - 2]


def inputs(sides=(8, 16)):
    return tuple(
        torch.empty(n, 3, side, side, device="meta")
        for n, side in zip((2, 3), sides, strict=True)
    )


def replay(found, network, x):
    results = []
    for step in found.steps:
        results.append(
            x if step.kind == "input" else step.run(network, results.__getitem__)
        )
    return results[found.output.index]


@pytest.mark.parametrize("side", [8, 16, 11])
def test_record_is_the_forward_method(side):
    network = Network().eval()
    found = record(MetaNetwork(network), lambda network, x: network(x), inputs())
    x = torch.randn(5, 3, side, side)
    assert torch.equal(replay(found, network, x), network(x))
    kinds = [step.kind for step in found.steps]
    assert kinds.count("module") == 2  # the Sequential is opened
    assert branch_on_size in [step.target for step in found.steps]


def test_the_network_is_not_changed():
    network = Network().eval()
    before = dict(network.__dict__), list(network.state_dict())
    record(MetaNetwork(network), lambda network, x: network(x), inputs())
    assert (network.__dict__, list(network.state_dict())) == before
    assert all(not parameter.is_meta for parameter in network.parameters())


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[2] > 10 else x


def test_a_method_that_branches_on_the_size_cannot_be_recorded():
    with pytest.raises(TypeError, match="depends on the size"):
        record(MetaNetwork(Branches()), lambda network, x: network(x), inputs())
    # Of one size it can, and inside a module that is not opened.
    assert (
        len(record(MetaNetwork(Branches()), lambda n, x: n(x), inputs((8, 8))).steps)
        > 1
    )
    assert (
        len(
            record(
                MetaNetwork(nn.Sequential(Branches())), lambda n, x: n(x), inputs()
            ).steps
        )
        == 2
    )


def test_a_constant_tensor_cannot_be_recorded():
    with pytest.raises(TypeError, match="constant tensor"):
        record(
            MetaNetwork(nn.Identity()), lambda network, x: x + torch.ones(1), inputs()
        )


def test_other_methods_of_modules_are_single_steps():
    class Sides(nn.Module):
        def sides(self, x: torch.Tensor) -> tuple[int, int]:
            return (x.shape[2] // 2, 7)

        def ratio(self) -> int:
            return 3

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sides()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half, seven = self.inner.sides(x)
            return x[:, :, : half * self.inner.ratio() + seven]

    found = record(MetaNetwork(Outer()), lambda network, x: network(x), inputs())
    assert Step("module", ("inner", "sides"), (Ref(0),), {}) in found.steps
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(replay(found, Outer(), x), x[:, :, :55])
