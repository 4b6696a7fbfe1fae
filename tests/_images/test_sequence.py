"""An image sequence decodes images on access, and can be pickled."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from mean_color import STACK, MeanColor, save_stack
from PIL import Image

from sktl._images.validation import validate_images


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Return the paths of three PNG files with the pixels of STACK."""
    return save_stack(tmp_path)


def test_files_are_opened_on_access(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"/missing/{i}.png" for i in range(1000)]
    with monkeypatch.context() as patch:
        patch.delattr("builtins.open")
        patch.delattr("os.stat")
        forms = [
            names,
            np.array(names),
            pd.DataFrame({"path": names}),
            pl.Series(names),
        ]
        images = [MeanColor().validate(X, reset=True) for X in forms]
    for each in images:
        assert len(each) == 1000
        with pytest.raises(
            ValueError, match=r"X\[999\] \('/missing/999.png'\): No such file"
        ):
            each[999]


def test_images_are_not_copied(paths: list[str]) -> None:
    column = pd.Series(paths, dtype="string")
    images = MeanColor().validate(column)
    assert images._images is column.array
    assert MeanColor().validate(paths)._images is paths


def test_X_is_not_modified() -> None:
    for dtype in (np.uint8, np.float32, np.int8):
        X = STACK.astype(dtype)
        before = X.copy()
        images = MeanColor(pixel_range=(-200, 300)).validate(X)
        images[0].putpixel((0, 0), (1, 2, 3))
        np.testing.assert_array_equal(X, before)


def test_threads_decode_concurrently(paths: list[str]) -> None:
    images = MeanColor().validate(pl.Series(paths * 20))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(images.__getitem__, range(len(images))))
    for index, image in enumerate(results):
        np.testing.assert_array_equal(np.asarray(image), STACK[index % 3])


def test_iteration_ends(paths: list[str]) -> None:
    for X in (paths, STACK, pd.Series(paths), pl.Series(paths), STACK[..., 0]):
        assert len(list(MeanColor().validate(X))) == len(paths)


def test_portable_paths_are_absolute(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(paths[0]).parent
    monkeypatch.chdir(folder)
    X = [Path(paths[0]).name, Path(Path(paths[1]).name), paths[2], STACK[2]]
    images = validate_images(X, estimator=MeanColor(), reset=True).subset([3, 1, 0, 2])
    expected = [np.asarray(image) for image in images]
    portable = images.portable()
    monkeypatch.chdir(tmp_path.parent)
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(portable[index]), image)
    assert [portable.original_index(index) for index in range(4)] == [3, 1, 0, 2]


def test_portable_images_are_pickled_without_loss() -> None:
    palette = Image.fromarray(STACK[0]).convert("RGBA")
    palette.putalpha(90)
    rotated = Image.fromarray(STACK[1])
    rotated.getexif()[274] = 6  # rotated by 90 degrees
    tensors = torch.from_numpy(np.repeat(STACK[:2], 100, axis=0))
    X = [palette.quantize(), rotated, Image.fromarray(STACK[2]).convert("L"), *tensors]
    images = validate_images(X, estimator=MeanColor(), reset=True)
    some = images.subset(range(5))
    portable = pickle.loads(pickle.dumps(some.portable()))
    for index in range(5):
        expected = np.asarray(some[index])
        np.testing.assert_array_equal(np.asarray(portable[index]), expected)
    assert portable.content_hashes() == some.content_hashes()
    assert len(pickle.dumps(images.subset([3, 4]).portable())) < 20 * STACK[0].nbytes
