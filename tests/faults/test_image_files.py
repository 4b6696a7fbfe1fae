"""Invalid image files, and files with unusual names, passed to each estimator.

Decoding of each kind of file is tested in `tests/_images/test_decode.py`.
"""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from estimators import ESTIMATORS, output_of
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from sktl import FeatureStore, PretrainedFeatures

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

Y = np.arange(40) % 2


def valid_file(format="PNG"):
    """Return an image file of 20 x 20 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format)
    return buffer.getvalue()


def bomb():
    """Return a small file of a hundred million pixels."""
    Image.new("1", (10_000, 10_000)).save(buffer := io.BytesIO(), "PNG")
    assert len(buffer.getvalue()) < 100_000
    return buffer.getvalue()


BAD_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated JPEG": lambda path: path.write_bytes(valid_file("JPEG")[:400]),
    "truncated PNG": lambda path: path.write_bytes(valid_file()[:200]),
    "text": lambda path: path.write_text("404 not found"),
    "directory": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "pipe": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "bomb": lambda path: path.write_bytes(bomb()),
}


def bad_file_of(estimator, name):
    """Return a parameter: all files with features, one with each other estimator."""
    is_quick = isinstance(estimator, PretrainedFeatures) or name == "text"
    return pytest.param(estimator, name, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("estimator", "name"),
    [bad_file_of(estimator, name) for estimator in ESTIMATORS for name in BAD_FILES],
)
def test_unreadable_file_is_named_in_every_estimator(
    estimator, name, memory, paths, tmp_path
):
    bad = tmp_path / "bad image"
    BAD_FILES[name](bad)
    store = tmp_path / "store"
    mine = clone(estimator).set_params(memory=store if memory else None, n_jobs=2)
    mine.fit(paths, Y)
    expected, threads = output_of(mine, paths), threading.active_count()
    for index in (0, 33):
        X = [*paths[:index], bad, *paths[index + 1 :]]
        with pytest.raises(ValueError, match=rf"X\[{index}\] \('.*bad image'\)"):
            output_of(mine, X)
        if not isinstance(
            mine, PretrainedFeatures
        ):  # whose fit does not read the images
            with pytest.raises(ValueError, match=rf"X\[{index}\] \('.*bad image'\)"):
                clone(mine).fit(X, Y)
    assert threading.active_count() <= threads
    np.testing.assert_array_equal(output_of(mine, paths), expected)
    if memory and isinstance(mine, PretrainedFeatures):
        assert FeatureStore(store).info()["rows"] == len(paths)


def test_image_too_large_raises_where_pillow_warns():
    with pytest.raises(ValueError, match="10000 x 10000 pixels; files of more than"):
        PretrainedFeatures("tiny").transform([bomb()])


def test_search_raises_the_error_of_an_image(paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(valid_file()[:200])
    X = [*paths[:30], str(tmp_path / "bad.png"), *paths[31:]]
    with pytest.raises(ValueError, match=r"bad\.png"):
        cross_val_score(ESTIMATORS[0], X, Y, cv=2, error_score="raise")


NAMES = [
    " leading and trailing ",
    "new\nline.png",
    "100%s {0} $HOME.png",
    "quo'te\".png",
    "-n.png",
    "été été.png",
    "蜂🐝.PNG",
    "a:b.png",
    "http:",
    "~",
    "x" * 250,
    "image.txt",
    "NUL.png",
    "*?[a].png",
    "back\\slash.png",
]


@pytest.mark.skipif(os.name != "posix", reason="names that only POSIX allows")
@pytest.mark.parametrize("name", NAMES)
def test_unusual_file_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = PretrainedFeatures("tiny", memory=tmp_path / "store")
    with pytest.raises(ValueError, match=r"X\[0\] \(.*No such file") as error:
        mine.transform([name])
    str(error.value).encode()
    Path(tmp_path / name).write_bytes(valid_file())
    expected = PretrainedFeatures("tiny").transform([valid_file()])
    for form in (name, Path(name), str(tmp_path / name)):
        for _ in range(2):
            np.testing.assert_array_equal(mine.transform([form]), expected)


def test_bytes_are_content_not_a_path(tmp_path):
    (tmp_path / "a.png").write_bytes(valid_file())
    with pytest.raises(ValueError, match=r"Cannot read image X\[0\] \(bytes\)"):
        PretrainedFeatures("tiny").transform([os.fsencode(tmp_path / "a.png")])


DESCRIPTORS = """
import os, sys, warnings
import numpy as np
from sktl import PretrainedFeatures
warnings.simplefilter("error")
good, bad, store = sys.argv[1:]
count_open = lambda: len(os.listdir("/proc/self/fd"))
for memory in (None, store):
    mine = PretrainedFeatures("resnet_mini", memory=memory, engine="torch", n_jobs=2)
    counts = []
    for _ in range(10):
        mine.transform([good, open(good, "rb").read()] * 3)
        try:
            mine.transform([good, bad])
        except ValueError:
            counts.append(count_open())
    assert len(counts) == 10 and counts[-1] <= counts[1], counts
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc of Linux")
def test_no_file_stays_open(tmp_path):
    (tmp_path / "good.png").write_bytes(valid_file())
    (tmp_path / "bad.png").write_bytes(valid_file()[:200])
    files = [str(tmp_path / name) for name in ("good.png", "bad.png", "store")]
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", DESCRIPTORS]
    run = subprocess.run([*command, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
