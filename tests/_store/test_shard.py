"""A shard is a safetensors file, and reading it executes nothing."""

import ast
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from store_rows import KEYS, find_shards, make_rows

from sktl._store import feature_store, row_cache, shard_index
from sktl._store import shard as shard_module


def test_a_shard_is_a_safetensors_file(filled_store):
    (shard,) = find_shards(filled_store.directory)
    tensors = load_file(shard)
    assert tensors["keys"].tobytes() == b"".join(KEYS)
    np.testing.assert_array_equal(tensors["rows"], make_rows(KEYS))
    assert not list(Path(filled_store.directory).rglob("*.tmp"))


def test_store_imports_no_pickle():
    modules = (feature_store, shard_index, shard_module, row_cache)
    source = "".join(Path(module.__file__).read_text() for module in modules)
    tree = ast.parse(source)
    names = {
        a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names.isdisjoint({"pickle", "joblib", "marshal", "shelve", "torch"})
