"""What is written about the library is true: docstrings, defaults, README."""

import ast
import inspect
import re
from pathlib import Path

import pandas as pd
import pytest
from numpydoc.docscrape import FunctionDoc, NumpyDocString
from numpydoc.validate import validate
from PIL import Image

import sktl

README = Path(__file__).parents[1] / "README.md"

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
def test_defaults_are_those_of_the_signature(name):
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


def test_public_methods_say_what_they_raise():
    for method in (
        sktl.PretrainedFeatures.fit,
        sktl.PretrainedFeatures.transform,
        sktl.FineTunedCNNClassifier.fit,
        sktl.FineTunedCNNClassifier.partial_fit,
        sktl.FineTunedCNNClassifier.predict,
    ):
        doc = FunctionDoc(method)
        assert {entry.type for entry in doc["Raises"]} >= {"ValueError"}


@pytest.fixture
def readers_folder(tmp_path, monkeypatch, pictures):
    """Folder with what the README starts from: photos and a table of observations."""
    rows = []
    for name, tiles in (("ants", pictures[:20]), ("bees", pictures[20:])):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, tile in enumerate(tiles):
            path = f"photos/{name}/{i}.png"
            Image.fromarray(tile).save(tmp_path / path)
            rows.append((path, 100.0 * i, "abc"[i % 3], name))
    table = pd.DataFrame(rows, columns=["path", "altitude", "site", "species"])
    table.to_csv(tmp_path / "observations.csv", index=False)
    monkeypatch.chdir(tmp_path)


# Small networks in the README's place of one that would have to be downloaded.
TINY = 'PretrainedFeatures("tiny"'


@pytest.mark.usefixtures("readers_folder")
def test_readme_code_runs(capsys):
    text = README.read_text().replace('PretrainedFeatures("resnet18"', TINY)
    text = text.replace("resnet18", "resnet_mini").replace('"ant"', '"fly"')
    text = text.replace('["stage3", "stage4"]', '["stem", "stage1"]')
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    out = capsys.readouterr().out
    assert len(re.findall(r"^\[[01. \d]+\]$", out, flags=re.MULTILINE)) == 3
    assert "picture__tiny_penultimate_0" in out
    assert "{'features__layer': " in out


def test_readme_has_the_two_commands():
    commands = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        assert "python3 -m venv" in command
        assert "pip install" in command
