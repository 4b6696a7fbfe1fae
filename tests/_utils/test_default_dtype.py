"""Tests of sktl._utils.default_dtype."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models, transforms

from sktl._utils.default_dtype import float32_default, float32_default_if_needed

FACTORIES = {
    "empty": lambda: torch.empty(2).fill_(1.0),
    "zeros": lambda: torch.zeros(2),
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(size=(3,)),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "full": lambda: torch.full((2,), 0.1),
    "full of int": lambda: torch.full((2,), 1),
    "arange": lambda: torch.arange(0, 1, 0.1),
    "arange of int": lambda: torch.arange(3),
    "tensor": lambda: torch.tensor([0.1, 0.2]),
    "tensor of array": lambda: torch.tensor(np.array([0.1])),
    "tensor of scalar": lambda: torch.tensor(np.float64(0.1)),
    "tensor of scalars": lambda: torch.tensor([[np.float64(0.1)]]),
    "tensor of nothing": lambda: torch.tensor([]),
    "quotient": lambda: torch.arange(5) / 3,
    "product": lambda: torch.arange(5) * 0.1,
    "root": lambda: torch.arange(5).sqrt(),
    "double": lambda: torch.arange(5).double(),
    "to": lambda: torch.arange(5).to(torch.float64),
    "explicit": lambda: torch.zeros(2, dtype=torch.float64),
    "of floats": lambda: torch.ones(2, dtype=torch.float64) / 3,
    "linear": lambda: nn.Linear(2, 3).weight,
    "crop": lambda: torch.tensor(
        transforms.RandomResizedCrop.get_params(
            torch.zeros(3, 50, 50), [0.1, 1.0], [0.5, 2.0]
        )
    ),
}


@pytest.fixture
def double_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("context", [float32_default, float32_default_if_needed])
def test_tensors_are_those_of_a_float32_default(name, context, double_default):
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.float64)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        expected = FACTORIES[name]()
    torch.manual_seed(0)
    with context():
        got = FACTORIES[name]()
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert torch.get_default_dtype() == torch.float64


def test_other_threads_keep_the_default(double_default):
    found = []
    with float32_default():
        thread = threading.Thread(target=lambda: found.append(torch.zeros(1).dtype))
        thread.start()
        thread.join()
    assert found == [torch.float64]


@pytest.mark.parametrize(
    "name",
    [
        "regnet_y_400mf",
        pytest.param("convnext_tiny", marks=pytest.mark.slow),
        pytest.param("swin_v2_t", marks=pytest.mark.slow),
    ],
)
def test_networks_have_the_weights_of_a_float32_default(name):
    networks = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            torch.manual_seed(0)
            with float32_default():
                networks.append(models.get_model(name).state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    assert networks[0].keys() == networks[1].keys()
    for key, value in networks[0].items():
        assert networks[1][key].dtype == value.dtype, key
        assert torch.equal(networks[1][key], value), key
