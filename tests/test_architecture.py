"""The layout of the library: packages, allowed imports, and public names."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sktl

ROOT = Path(sktl.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "how_it_works.md"

# What the modules of each package may import, besides those of the same package. A
# dot stands for one module of a package. This list is also in `PAGE`.
ALLOWED = {
    "_training": {"_inference", "_backbones", "_images", "_store", "_utils"},
    "_inference": {"_backbones", "_images", "_store", "_utils"},
    "_backbones": {"_images.preprocessing", "_utils"},
    "_images": {"_utils"},
    "_store": {"_utils"},
    "_utils": set(),
}
ESTIMATORS = {
    "_fine_tuned_cnn_classifier",
    "_fine_tuned_cnn_regressor",
    "_pretrained_classifier",
    "_pretrained_features",
}


def name_of(path: Path) -> str:
    """Name a module within sktl: ``"_images.decode"``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    name_of(path): ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports_of(module: str) -> set[str]:
    """Names of the modules of sktl that one of them imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    own = {name.removeprefix("sktl.") for name in names if name.startswith("sktl.")}
    return own & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_allowed(module):
    package = module.split(".")[0]
    for imported in imports_of(module):
        other = imported.split(".")[0]
        if package in ALLOWED:
            allowed = ALLOWED[package] | {package}
            assert {other, imported} & allowed, f"{module} imports {imported}"
        else:  # an estimator or a command line, which stand side by side
            assert other in ALLOWED, f"{module} imports {imported}"


def test_documented_imports_are_those_allowed():
    rows = re.findall(r"^\| `(_\w+)` \| .+ \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: set(re.findall("`(.+?)`", cell)) for name, cell in rows} == ALLOWED


def test_documented_modules_are_those_that_exist():
    (tree,) = re.findall(
        r"^sktl/\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    documented, package = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            package = name.replace("/", ".")
        else:
            documented.append(package + name)
    assert sorted(documented) == sorted(MODULES)


def test_no_cycle_between_modules():
    TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()


def test_no_cycle_between_packages():
    allowed = {p: {i.split(".")[0] for i in ALLOWED[p]} for p in ALLOWED}
    TopologicalSorter(allowed).prepare()


def test_every_module_has_its_place():
    assert {m for m in MODULES if "." not in m} == {
        *ESTIMATORS,
        "_describe_backbone",
        "store",
    }
    assert {m.split(".")[0] for m in MODULES if "." in m} == ALLOWED.keys()


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_reexport_nothing(package):
    assert (ROOT / package / "__init__.py").read_text() == ""


@pytest.mark.parametrize("module", [m for m in MODULES if "." in m])
def test_every_private_module_has_its_tests(module):
    package, name = module.split(".")
    assert (Path(__file__).parent / package / f"test_{name}.py").exists()


def test_private_names_of_scikit_learn_are_used_in_one_module():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "sklearn"
            ):
                names = [*node.module.split("."), *(a.name for a in node.names)]
                private = [name for name in names if name.startswith("_")]
                assert not private or module == "_utils.sklearn_compat", module


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    n_lines = len((ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines())
    assert n_lines <= (650 if module in ESTIMATORS else 450)


def test_public_names_are_sorted_and_importable():
    assert sktl.__all__ == sorted(sktl.__all__)
    for name in sktl.__all__:
        assert getattr(sktl, name).__name__ == name
    assert set(sktl.__all__) <= set(dir(sktl))
    with pytest.raises(AttributeError, match="no attribute 'PretrainedFeature'"):
        _ = sktl.PretrainedFeature


def test_one_public_class_per_estimator_module():
    for module in ESTIMATORS:
        classes = [n.name for n in MODULES[module].body if isinstance(n, ast.ClassDef)]
        public = [name for name in classes if not name.startswith("_")]
        assert [name.lower() for name in public] == [module.replace("_", "")]


@pytest.mark.parametrize("heavy", ["torch", "sklearn", "PIL"])
def test_import_sktl_is_light(heavy):
    code = f"import sys, sktl; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_store_imports_no_torch():
    code = "import sys, sktl._store.feature_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
