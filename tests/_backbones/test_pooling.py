"""Tests of sktl._backbones.pooling."""

import numpy as np
import pytest
import torch

from sktl._backbones.pooling import patch_map, pool


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


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
def test_prefix_tokens_are_not_pooled_with_patches(n_prefix):
    x = torch.rand(2, n_prefix + 16, 3)
    patches = x[:, n_prefix:].numpy()
    expected = {
        "avg": patches.mean(1),
        "max": patches.max(1),
        "gem": (patches.astype(float) ** 3).mean(1) ** (1 / 3),
        "flatten": x.flatten(1).numpy(),
    }
    for pooling, rows in expected.items():
        got = pool(x, pooling, "a", n_prefix_tokens=n_prefix)
        np.testing.assert_allclose(got, rows, rtol=1e-5, err_msg=pooling)
    grid = pool(patch_map(x, n_prefix, "a"), 2, "a").reshape(2, 3, 2, 2)
    top_right = patches.reshape(2, 4, 4, 3)[:, :2, 2:].mean((1, 2))
    np.testing.assert_allclose(grid[:, :, 0, 1], top_right, rtol=1e-5)


def test_class_token():
    x = torch.rand(2, 7, 5)
    torch.testing.assert_close(pool(x, "cls", "a", n_prefix_tokens=2), x[:, 0])
    for each, options in (
        (x, {}),
        (x, {"n_prefix_tokens": 4, "has_class_token": False}),  # only registers
        (torch.rand(2, 5, 3, 3), {"n_prefix_tokens": 1}),
    ):
        with pytest.raises(ValueError, match="'cls' needs a layer with a class token"):
            pool(each, "cls", "a", **options)
    vectors = torch.rand(2, 5)  # have no positions
    torch.testing.assert_close(pool(vectors, "cls", "a"), vectors)


def test_tokens_that_cannot_be_pooled_raise():
    x = torch.rand(2, 7, 5)
    with pytest.raises(ValueError, match=r"'a', with 6 patch tokens\. Choose another"):
        patch_map(x, 1, "a")
    with pytest.raises(ValueError, match=r"class and register tokens alone\. .*'cls'"):
        pool(x, "avg", "a", n_prefix_tokens=7)


def test_pooled_rows_do_not_change_with_the_network():
    x = torch.rand(2, 5)
    rows = pool(x, "avg", "a")
    x.zero_()
    assert rows.abs().sum() > 0
