"""What is written about the library is true: docstrings, defaults, README, pages."""

import ast
import contextlib
import doctest
import inspect
import io
import re
from pathlib import Path

import pandas as pd
import pytest
from numpydoc.docscrape import FunctionDoc, NumpyDocString
from numpydoc.validate import validate
from PIL import Image
from torchvision import models

import sktl

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# A block of code, and what the page says it prints.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
# index.md is compared with the README below; scaling.md runs in test_distributed.py.
ELSEWHERE = {"index.md", "scaling.md"}

# Rules of numpydoc that say nothing about us, each with its reason.
IGNORED = {
    "ES01": "a docstring without an extended summary can be complete",
    "EX01": "classes have examples; their methods are shown in them",
    "GL01": "the summary starts on the line of the quotes, as ruff checks",
    "RT02": "a returned value has a name where that helps, as in scikit-learn",
    "SA01": "not everything has something to see also",
    "SA04": "a reference to another library speaks for itself",
    "YD01": "nothing here yields",
}


def documented() -> list[str]:
    names = []
    for name in sktl.__all__:
        public = getattr(sktl, name)
        names.append(f"sktl.{name}")
        if inspect.isclass(public):
            for method, value in vars(public).items():
                if inspect.isfunction(value) and not method.startswith("_"):
                    names.append(f"sktl.{name}.{method}")
    return names


@pytest.mark.parametrize("name", documented())
def test_docstrings_are_numpydoc(name):
    errors = [(c, text) for c, text in validate(name)["errors"] if c not in IGNORED]
    assert errors == []


@pytest.mark.parametrize("name", sktl.__all__)
def test_documented_defaults_equal_the_signature(name):
    public = getattr(sktl, name)
    doc = NumpyDocString(inspect.getdoc(public))
    written = {
        parameter: text.group(1)
        for entry in doc["Parameters"]
        for parameter in entry.name.split(", ")
        if (text := re.search(r"default=(.+)$", entry.type))
    }
    for parameter in inspect.signature(public).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            assert parameter.name not in written
        elif isinstance(parameter.default, tuple):
            assert parameter.name in written
        else:
            value = ast.literal_eval(written[parameter.name])
            assert (type(value), value) == (type(parameter.default), parameter.default)


def test_public_methods_document_what_they_raise():
    for method in (
        sktl.PretrainedFeatures.fit,
        sktl.PretrainedFeatures.transform,
        sktl.FineTunedCNNClassifier.fit,
        sktl.FineTunedCNNClassifier.partial_fit,
        sktl.FineTunedCNNClassifier.predict,
        sktl.FineTunedCNNRegressor.fit,
        sktl.FineTunedCNNRegressor.partial_fit,
        sktl.FineTunedCNNRegressor.predict,
    ):
        doc = FunctionDoc(method)
        assert {entry.type for entry in doc["Raises"]} >= {"ValueError"}


@pytest.fixture
def readers_folder(tmp_path, monkeypatch, images):
    """Folder with what the README starts from: photos and a table of observations."""
    rows = []
    for name, tiles in (("ants", images[:20]), ("bees", images[20:])):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, tile in enumerate(tiles):
            path = f"photos/{name}/{i}.png"
            Image.fromarray(tile).save(tmp_path / path)
            rows.append((path, 100.0 * i, "abc"[i % 3], name))
    table = pd.DataFrame(rows, columns=["path", "altitude", "site", "species"])
    table.to_csv(tmp_path / "observations.csv", index=False)
    monkeypatch.chdir(tmp_path)


# Small networks in the README's place of one that would have to be downloaded.
SMALL = {
    "PretrainedClassifier": "resnet_mini",  # has categories
    "PretrainedFeatures": "tiny",
    "FineTunedCNNClassifier": "five stages",
}


@pytest.mark.docs
@pytest.mark.usefixtures("readers_folder")
def test_readme_code_runs(capsys):
    text = README.read_text().replace('"ant"', '"fly"')
    for estimator, network in SMALL.items():
        text = text.replace(f'{estimator}("resnet18"', f'{estimator}("{network}"')
    text = text.replace('["stage3", "stage4"]', '["stem", "stage1"]')
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert not [block for block in blocks if "resnet18" in block]
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    out = capsys.readouterr().out
    assert len(re.findall(r"^\[[01. \d]+\]$", out, flags=re.MULTILINE)) == 3
    assert "image__tiny_penultimate_0" in out
    assert "{'features__layer': " in out


def test_readme_has_the_two_commands():
    commands = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        assert "python3 -m venv" in command
        assert "pip install" in command


def run_blocks(page, blocks):
    """Run blocks one after the other, and compare what they print with the page."""
    checker = doctest.OutputChecker()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names: dict[str, object] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        said = f"{page}:\n{code}\nprints\n{printed.getvalue()}\nnot\n{expected}"
        assert checker.check_output(expected, printed.getvalue(), flags), said


@pytest.fixture(scope="module")
def folder_of_digits(tmp_path_factory):
    """Follow Getting started up to its folder of images."""
    folder = tmp_path_factory.mktemp("docs")
    page = DOCS / "getting_started.md"
    with contextlib.chdir(folder):
        run_blocks(page, BLOCK.findall(page.read_text())[:1])
    return folder


PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.name not in ELSEWHERE and BLOCK.search(page.read_text())
]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(DOCS)),
            # By default one short page.
            marks=[] if page.name == "images.md" else pytest.mark.docs,
        )
        for page in PAGES
    ],
)
def test_code_of_a_page_prints_the_documented_output(
    page, folder_of_digits, monkeypatch
):
    blocks = BLOCK.findall(page.read_text())
    if any('"timm/' in code for code, _ in blocks):
        pytest.importorskip("timm")
    # As for a script in that folder.
    monkeypatch.syspath_prepend(folder_of_digits)
    with contextlib.chdir(folder_of_digits):
        run_blocks(page, blocks)


def test_table_of_networks_has_the_published_figures():
    page = (DOCS / "user_guide" / "networks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.+) \| (.+) \| (.+) \|$", page, re.M)
    assert len(rows) > 5
    for name, *written in rows:
        weights = models.get_model_weights(name).DEFAULT
        meta = weights.meta
        assert written == [
            f"{weights.transforms().crop_size[0]}",
            f"{meta['num_params'] / 1e6:.1f}",
            f"{meta['_ops']:.2f}",
            f"{meta['_metrics']['ImageNet-1K']['acc@1']:.1f}",
        ]


def test_the_first_page_begins_as_the_readme():
    first = [BLOCK.search(page.read_text()) for page in (README, DOCS / "index.md")]
    assert first[0].group(1) == first[1].group(1)


def test_every_public_name_is_in_the_api_page():
    listed = re.findall(
        r"^   ([A-Za-z_]+)$", (DOCS / "api.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(sktl.__all__)


@pytest.mark.parametrize("name", ["PretrainedFeatures", "FineTunedCNNClassifier"])
def test_html_representation_has_no_documentation_link(name):
    assert "href=" not in getattr(sktl, name)()._repr_html_()


def test_no_link_to_a_site_that_the_project_does_not_own():
    pages = [README, ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]
    for page in [*pages, *DOCS.rglob("*.md")]:
        assert "sktl.readthedocs" not in page.read_text(), page


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_tests_that_a_page_names_are_there(page):
    text = (DOCS / page).read_text()
    folder = ROOT / "tests"
    code = "".join(path.read_text() for path in folder.rglob("test_*.py"))
    there = set(re.findall(r"def (test_\w+)", code))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    assert named <= there
    for path in re.findall(r"`(tests/\S*test_\w+\.py)`", text):
        assert (ROOT / path).exists(), path
