"""Tests of sktl._backbones.pooling."""

import numpy as np
import pytest
import torch

from sktl._backbones.pooling import pool


def test_pooling():
    x = torch.rand(2, 3, 4, 6)
    values = x.numpy().astype(np.float64)
    expected = {
        "avg": values.mean((2, 3)),
        "max": values.max((2, 3)),
        "gem": (values**3).mean((2, 3)) ** (1 / 3),
        "flatten": values.reshape(2, -1),
        1: values.mean((2, 3)),
        2: values.reshape(2, 3, 2, 2, 2, 3).mean((3, 5)).reshape(2, -1),
    }
    for pooling, rows in expected.items():
        got = pool(x, pooling, "a").numpy()
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, rows, rtol=1e-5, err_msg=str(pooling))


def test_pooling_of_tokens_is_over_the_tokens():
    x = torch.rand(2, 7, 5)  # (n, tokens, channels)
    torch.testing.assert_close(pool(x, "avg", "a"), x.mean(1))
    with pytest.raises(ValueError, match=r"pooling=2 needs .* rows and columns"):
        pool(x, 2, "encoder")


def test_pooled_rows_do_not_change_with_the_network():
    x = torch.rand(2, 5)
    rows = pool(x, "avg", "a")
    x.zero_()
    assert rows.abs().sum() > 0
