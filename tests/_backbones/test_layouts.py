"""Tests of sktl._backbones.layouts."""

import pytest
from torch import nn

from sktl._backbones.layouts import is_channels_last


@pytest.mark.parametrize(
    ("module", "shape", "larger", "expected"),
    [
        (nn.Identity(), (2, 8, 8, 8), (2, 8, 16, 16), False),
        (nn.Identity(), (2, 8, 8, 8), (2, 16, 16, 8), True),
        (nn.Identity(), (2, 8, 8, 8), (2, 16, 16, 16), None),
        (nn.Identity(), (2, 8, 7, 7), (2, 8, 7, 7), None),
        (nn.Identity(), (2, 8, 7, 7), None, None),
        (nn.Identity(), (2, 8, 7, 7), (2, 64), None),
        (nn.Identity(), (2, 8, 1, 1), (2, 8, 1, 1), False),
        (nn.Identity(), (2, 1, 1, 8), None, True),
        (nn.Identity(), (2, 1, 1, 1), None, None),
        (nn.Conv2d(3, 8, 1), (2, 8, 7, 7), None, False),
        (nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(7)), (2, 8, 7, 7), None, False),
        (nn.Linear(8, 8), (2, 7, 7, 8), None, True),
        (nn.LayerNorm(8), (2, 7, 7, 8), (2, 7, 7, 8), True),
        (nn.LayerNorm([8, 7, 7]), (2, 8, 7, 7), None, None),
        # What is measured counts, whatever the module is.
        (nn.LayerNorm(8), (2, 8, 4, 4), (2, 8, 8, 8), False),
        (nn.Sequential(), (2, 8, 7, 7), None, None),
    ],
)
def test_layouts(module, shape, larger, expected):
    assert is_channels_last(module, shape, larger) is expected
