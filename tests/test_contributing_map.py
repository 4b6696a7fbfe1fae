"""The table of questions in docs/contributing.md finds the files it names."""

import re
from pathlib import Path

import pytest

import sktl

ROOT = Path(__file__).parents[1]
PACKAGE = Path(sktl.__file__).parent
# | question | `sktl/file.py`, ... | `git grep -il 'word' -- 'sktl/*.py'` |
ROW = re.compile(
    r"^\| (.+\?) \| (.+) \| `git grep -il '(.+)' -- 'sktl/\*\.py'` \|$", re.MULTILINE
)
MAP = ROW.findall((ROOT / "docs" / "contributing.md").read_text())


def git_grep(word: str) -> set[str]:
    """Names of the modules that contain a word, in any case, as ``git grep -il``."""
    return {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*.py")
        if word.lower() in path.read_text().lower()
    }


def test_map_has_ten_questions():
    assert len(MAP) >= 10


@pytest.mark.parametrize(
    ("answer", "word"), [row[1:] for row in MAP], ids=[row[2] for row in MAP]
)
def test_search_finds_the_answer(answer, word):
    files = set(re.findall(r"`(sktl/[\w/]+\.py)`", answer))
    found = git_grep(word)
    assert files
    assert files <= found
    assert len(found) <= 2
