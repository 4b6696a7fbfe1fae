"""Run the tests with the lowest versions that `pyproject.toml` allows, or the newest.

``python tests/faults/versions.py lowest`` (or ``newest``) creates a virtual environment
in the folder for temporary files, runs the tests in it, prints the installed versions
and the result, and removes it; this takes 6 GB and a quarter of an hour. Further
arguments are passed to pytest. It needs the package packaging, a dependency of pytest.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def requirements() -> Iterator[Requirement]:
    """Yield the requirements of sktl and of its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["test"]]
    while lines:
        requirement = Requirement(lines.pop(0))
        if requirement.name == project["name"]:  # sktl[dask,plot]
            lines += [line for extra in requirement.extras for line in extras[extra]]
        else:
            yield requirement


def lowest(requirement: Requirement) -> str:
    """Return the lower bound of a requirement."""
    (bound,) = requirement.specifier
    if bound.operator != ">=":
        raise ValueError(f"A requirement must have a lower bound. Got {requirement}.")
    return bound.version


def main(which: str, *options: str) -> int:
    """Run the tests, and return the exit status of pytest."""
    stated = {canonicalize_name(r.name): lowest(r) for r in requirements()}
    pins = {"lowest": [f"{n}=={v}" for n, v in stated.items()], "newest": []}[which]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "Scripts" if os.name == "nt" else "bin", "python"))
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        install = [*pip, "install", "--quiet", "-e", f"{ROOT}[test]", *pins]
        subprocess.run(install, check=True)
        tests = subprocess.run([python, "-m", "pytest", *options], cwd=ROOT)
        listed = subprocess.check_output([*pip, "list", "--format=json"])
    installed = {canonicalize_name(p["name"]): p["version"] for p in json.loads(listed)}
    print(f"\n{'package':16}{'stated':12}installed")
    for name, version in stated.items():
        print(f"{name:16}{version:12}{installed[name]}")
    print(f"Python {sys.version.split()[0]}, {which}: pytest ended with", end=" ")
    print(tests.returncode, "(passed)" if tests.returncode == 0 else "(failed)")
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
