"""Rows that tell which image they belong to, for the tests of the store."""

from pathlib import Path

import numpy as np

SPACE = {"backbone": "tiny", "weights": "ab" * 32, "layer": "stage1"}
KEYS = [bytes([i]) * 32 for i in range(40)]


def rows_of(keys, width=3):
    """Rows that tell which key they belong to."""
    return np.array([[key[0] + i / 8 for i in range(width)] for key in keys], "f4")


def shards(directory):
    return sorted(Path(directory).rglob("*.safetensors"))


def check(mine, keys=KEYS, expected=None):
    positions, rows = mine.get(SPACE, keys)
    known = [keys[i] for i in positions]
    np.testing.assert_array_equal(rows, rows_of(known))
    assert len(known) == (len(keys) if expected is None else expected)
