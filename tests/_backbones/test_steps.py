"""Steps of a recorded forward method."""

import pytest
import torch
from torch import nn

from sktl._backbones.steps import Mode, Ref, Step, contains, map_nested


def test_nested_values():
    value = (1, [2, slice(3, None)], {"a": 4})
    doubled = map_nested(lambda v: v and 2 * v, value)
    assert doubled == (2, [4, slice(6, None)], {"a": 8})
    assert contains(value, dict) is False
    assert contains({"a": [Ref(1)]}, Ref)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Step("parameter", "weight"), 2.0),
        (Step("module", ("", "forward"), (Ref(0),)), 6.0),
        (Step("method", "add", (Ref(0), Ref(1))), 8.0),
        (Step("function", torch.sub, (Ref(0),), {"other": Ref(1)}), -2.0),
    ],
)
def test_run(step, expected):
    network = nn.Linear(1, 1, bias=False).requires_grad_(False)
    network.weight.fill_(2)
    results = [torch.full((1, 1), 3.0), torch.full((1, 1), 5.0)]
    assert step.run(network, results.__getitem__).item() == expected
    used = [i for i in (0, 1) if Ref(i) in (*step.args, *(step.kwargs or {}).values())]
    assert step.refs() == used


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_module(training):
    x = torch.ones(1000)
    options = {"p": 0.5, "training": Mode(not training)}
    step = Step("function", nn.functional.dropout, (Ref(0),), options)
    dropped = step.run(nn.Identity().train(training), lambda index: x)
    assert torch.equal(dropped, x) != training
    assert str(Mode(True)) == str(Mode(False))
