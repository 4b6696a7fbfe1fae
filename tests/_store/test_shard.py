"""A file of rows is a safetensors file, and nothing else is read as one."""

import ast
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from store_rows import KEYS, rows_of, shards

from sktl._store import feature_store, row_cache, shard_index
from sktl._store import shard as shard_module


def test_a_shard_is_a_safetensors_file(filled):
    (shard,) = shards(filled.directory)
    tensors = load_file(shard)
    assert tensors["keys"].tobytes() == b"".join(KEYS)
    np.testing.assert_array_equal(tensors["rows"], rows_of(KEYS))
    assert not list(Path(filled.directory).rglob("*.tmp"))


def test_c6_nothing_in_the_store_can_unpickle():
    rooms = (feature_store, shard_index, shard_module, row_cache)
    tree = ast.parse("".join(Path(room.__file__).read_text() for room in rooms))
    names = {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names.isdisjoint({"pickle", "joblib", "marshal", "shelve", "torch"})
