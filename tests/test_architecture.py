"""The floors of the library: who may import whom, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sktl

PACKAGE = Path(sktl.__file__).parent

# From the top floor down; a file imports from lines below its own, and nothing else.
FLOORS = [
    ["store"],
    ["_fine_tuned_cnn_classifier", "_pretrained_classifier", "_pretrained_features"],
    ["_one_fit"],
    ["_activations", "_checkpoint", "_saved_classifier", "_start"],
    ["_frozen_features"],
    ["_spreading"],
    ["_extractors", "_memory", "_training"],
    ["_batches", "_steps"],
    ["_views"],
    ["_augmentation", "_inference", "_labels", "_layers", "_linear_probe"],
    [
        "_backbones",
        "_engines",
        "_feature_store",
        "_images",
        "_tensor_file",
        "_trainable",
    ],
    ["_backbone", "_content", "_shard_index"],
    [
        "_execution",
        "_folding",
        "_kept_rows",
        "_shard",
        "_stages",
        "_weights",
        "_preprocessing",
        "_decode",
        "_random_state",
        "_resnet_mini",
    ],
    ["_pickle_check", "_sklearn_compat"],
]


def imports_of(module: str) -> set[str]:
    """Names of the files of sktl that one of them imports, wherever in it."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    named = [
        *(n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)),
        *(a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names),
    ]
    return {name.split(".")[1] for name in named if name.startswith("sktl.")}


def test_every_file_is_on_a_floor():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files == {module for floor in FLOORS for module in floor}


@pytest.mark.parametrize("depth", range(len(FLOORS)))
def test_arrows_point_down(depth):
    below = {module for floor in FLOORS[depth + 1 :] for module in floor}
    for module in FLOORS[depth]:
        assert imports_of(module) <= below, module


def test_private_names_of_scikit_learn_stay_in_one_room():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "sklearn"
            ):
                names = [*node.module.split("."), *(a.name for a in node.names)]
                private = [name for name in names if name.startswith("_")]
                assert not private or path.stem == "_sklearn_compat", (path, private)


def test_public_names_are_sorted_and_there():
    assert sktl.__all__ == sorted(sktl.__all__)
    for name in sktl.__all__:
        assert getattr(sktl, name).__name__ == name
    assert set(sktl.__all__) <= set(dir(sktl))
    with pytest.raises(AttributeError, match="no attribute 'PretrainedFeature'"):
        _ = sktl.PretrainedFeature


def test_one_public_class_per_file_above():
    for module in FLOORS[1]:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        public = [name for name in classes if not name.startswith("_")]
        assert [name.lower() for name in public] == [module.replace("_", "")]


@pytest.mark.parametrize("heavy", ["torch", "sklearn", "PIL"])
def test_import_sktl_is_light(heavy):
    code = f"import sys, sktl; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
