"""Rows computed from their keys, for the tests of the store."""

from pathlib import Path

import numpy as np

# A namespace, and keys of it.
SPACE = {"backbone": "tiny", "weights": "ab" * 32, "layer": "stage1"}
KEYS = [bytes([i]) * 32 for i in range(40)]


def make_rows(keys, width=3):
    """Return rows whose values identify their key."""
    return np.array([[key[0] + i / 8 for i in range(width)] for key in keys], "f4")


def find_shards(directory):
    """Return the paths of all shards of a store, sorted by age."""
    return sorted(Path(directory).rglob("*.safetensors"))


def check_rows(store, keys=KEYS, n_expected=None):
    """Check that the store has the right row of all keys, or of as many."""
    positions, rows = store.get(SPACE, keys)
    found = [keys[i] for i in positions]
    np.testing.assert_array_equal(rows, make_rows(found))
    assert len(found) == (len(keys) if n_expected is None else n_expected)
