"""Every form of X against the pixels it was made of; every misuse refused."""

import io
import pickle
import re
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator

from sktl._images.sequence import ImageSequence
from sktl._images.validation import validate_images

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (3, 6, 5), dtype=np.uint8)


class Mean(TransformerMixin, BaseEstimator):
    """The mean colour of each image; knows of images only `validate_images`."""

    def __init__(self, image_shape="auto", pixel_range="auto"):
        self.image_shape = image_shape
        self.pixel_range = pixel_range

    def images(self, X, reset=False) -> ImageSequence:
        return validate_images(
            X,
            estimator=self,
            reset=reset,
            image_shape=self.image_shape,
            pixel_range=self.pixel_range,
        )

    def fit(self, X, y=None):
        self.images(X, reset=True)
        return self

    def transform(self, X):
        means = [pixels.mean((0, 1)) for pixels in decoded(self.images(X))]
        return np.array(means, dtype=np.float32)

    def get_feature_names_out(self, input_features=None):
        return np.array(["red", "green", "blue"], dtype=object)

    def __sklearn_tags__(self):  # noqa: D105
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def decoded(images: ImageSequence) -> list[np.ndarray]:
    pil_images = [images[row] for row in range(len(images))]
    assert {image.mode for image in pil_images} <= {"RGB"}
    return [np.asarray(image) for image in pil_images]


def check(X, expected, **params) -> None:
    """Fit and transform see the same images, and these are the expected ones."""
    for reset in (True, False):
        result = decoded(Mean(**params).images(X, reset=reset))
        assert len(result) == len(expected)
        for pixels, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(pixels, wanted)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., np.newaxis], 3, axis=-1)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Three PNG files of what is in STACK."""
    names = [str(tmp_path / f"{i}.png") for i in range(len(STACK))]
    for name, pixels in zip(names, STACK, strict=True):
        Path(name).write_bytes(png(pixels))
    return names


# scikit-learn's contract


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_checks_of_scikit_learn() -> None:
    names = set()
    for estimator, check_ in estimator_checks_generator(Mean()):
        name = getattr(check_, "func", check_).__name__
        if name != "check_array_api_input":  # needs an environment variable at import
            check_(estimator)
            names.add(name)
    assert len(names) > 35
    assert {"check_n_features_in", "check_fit1d", "check_dtype_object"} <= names


def test_numbers_of_the_wrong_sort_get_the_words_of_scikit_learn() -> None:
    mean = Mean()
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array instead"):
        mean.fit([1.0, 2.0])
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array instead"):
        mean.fit(np.arange(3))
    with pytest.raises(ValueError, match="Expected 2D array, got scalar array"):
        mean.fit(3)
    with pytest.raises(ValueError, match="Expected a 2-dimensional container"):
        mean.fit(pd.Series([1.0, 2.0]))
    with pytest.raises(ValueError, match="Complex data not supported"):
        mean.fit(np.ones((2, 4, 5), dtype=complex))
    for kind in (sp.csr_matrix, sp.dok_matrix, sp.coo_array):
        with pytest.raises(TypeError, match="Sparse data was passed"):
            mean.fit(kind(np.eye(4)))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        mean.fit(np.full((2, 4, 5), np.nan))


@pytest.mark.parametrize(
    "X", [[], (), np.array([]), np.array([], dtype="U3"), pd.Series([], dtype=object)]
)
def test_empty_input(X: object) -> None:
    message = "Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is req"
    with pytest.raises(ValueError, match=re.escape(message) + "uired by Mean"):
        Mean().fit(X)


@pytest.mark.parametrize(
    "X",
    [
        np.empty((0, 4)),
        np.empty((0, 4, 4, 3)),
        pl.Series("p", [], pl.String).to_frame(),
    ],
)
def test_table_or_stack_without_rows(X: object) -> None:
    with pytest.raises(ValueError, match=r"0 sample\(s\).* by Mean"):
        Mean().fit(X)


def test_features_are_those_of_the_last_fit(paths: list[str]) -> None:
    mean = Mean().fit(np.zeros((2, 16)))
    assert mean.n_features_in_ == 16
    with pytest.raises(ValueError, match="X has 9 features, but Mean is expecting 16"):
        mean.transform(np.zeros((2, 9)))
    mean.fit(pd.DataFrame({"path": paths}))
    assert mean.n_features_in_ == 1
    assert mean.feature_names_in_.tolist() == ["path"]
    with pytest.raises(ValueError, match="feature names should match"):
        mean.transform(pd.DataFrame({"file": paths}))
    for X in (paths, STACK, GREY, [GREY[0], STACK[0]]):
        mean.fit(pd.DataFrame({"path": paths})).fit(X)
        assert not hasattr(mean, "n_features_in_")
        assert not hasattr(mean, "feature_names_in_")
        mean.transform(STACK[:, :3])  # any size is fine


def test_refused_input_leaves_the_features_alone() -> None:
    mean = Mean().fit(np.zeros((2, 16)))
    for X in (["http://x/y.png"], np.zeros((2, 5, 5, 2)), [None]):
        with pytest.raises(ValueError, match="X"):
            mean.fit(X)
    assert mean.n_features_in_ == 16


# Forms of X

PIXELS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 4]))


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint8, PIXELS))
def test_same_image_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray
) -> None:
    file = png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    path = tmp_path_factory.getbasetemp() / "image.png"
    path.write_bytes(file)
    with Image.open(path) as image:
        forms = [path, str(path), file, image, pixels, torch.from_numpy(pixels)]
        first, *others = decoded(Mean().pictures(forms))
    for other in others:
        np.testing.assert_array_equal(other, first)
    check(pixels[np.newaxis], [first])
    check(torch.from_numpy(pixels)[None], [first])
    check(pixels.reshape(1, -1), [first], image_shape=pixels.shape)


@pytest.mark.parametrize(
    "container",
    [
        list,
        tuple,
        deque,
        np.array,
        lambda x: np.array(x, dtype=object),
        lambda x: np.array(x, dtype=object)[:, np.newaxis],
        lambda x: [[path] for path in x],
        lambda x: [Path(path) for path in x],
        lambda x: [Path(path).read_bytes() for path in x],
        lambda x: pd.Series(x, index=[7, 8, 9]),
        lambda x: pd.Series(x, dtype="string"),
        lambda x: pd.Series(x, dtype=object),
        lambda x: pd.Series(x, dtype="category"),
        lambda x: pd.Series([Path(path) for path in x]),
        lambda x: pd.Series([Image.fromarray(pixels) for pixels in STACK]),
        lambda x: pd.Series(list(STACK)),
        lambda x: pd.DataFrame({"path": x}, index=[2, 0, 1]),
        lambda x: pd.DataFrame({"path": list(STACK)}),
        lambda x: pd.Index(x),
        lambda x: pl.Series("path", x),
        lambda x: pl.Series("path", x, dtype=pl.Categorical),
        lambda x: pl.Series("file", [Path(path).read_bytes() for path in x]),
        lambda x: pl.DataFrame({"path": x}),
        lambda x: [Path(x[0]), Image.fromarray(STACK[1]), torch.from_numpy(STACK[2])],
    ],
)
def test_container(container, paths: list[str]) -> None:
    check(container(paths), STACK)


def test_column_chosen_by_a_column_transformer(paths: list[str]) -> None:
    X = {"price": [1, 2, 3], "path": paths}
    columns = ColumnTransformer([("images", Mean(), ["path"])])
    expected = STACK.mean((1, 2), dtype=np.float64)
    for table in (pd.DataFrame(X), pl.DataFrame(X)):
        np.testing.assert_allclose(columns.fit_transform(table), expected, rtol=1e-6)
    for table in (pd.DataFrame(X), pl.DataFrame(X), pd.DataFrame(X).to_numpy()):
        with pytest.raises(ValueError, match=r"X has 2 columns, and paths.* Choose it"):
            Mean().fit(table)


def test_images_of_all_sizes_and_channels() -> None:
    grey, colour = GREY[0], STACK[1]
    opaque = np.dstack([STACK[2], np.full((6, 5), 255, np.uint8)])
    X = [grey, grey[:2, :3, np.newaxis], colour[::-1, ::2], opaque]
    expected = [three(grey), three(grey[:2, :3]), colour[::-1, ::2], STACK[2]]
    check(X, expected)
    clear = np.zeros((1, 2, 2, 4), np.uint8)
    check(clear, np.full((1, 2, 2, 3), 255))  # black, but transparent, on white


@pytest.mark.parametrize("kind", ["F", "read-only", "memmap", "negative strides"])
def test_layout_in_memory_does_not_matter(kind: str, tmp_path: Path) -> None:
    if kind == "memmap":
        np.save(tmp_path / "x.npy", STACK)
        X = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif kind == "negative strides":
        X = STACK[:, ::-1].copy()[:, ::-1]
    else:
        X = STACK.copy(order="F" if kind == "F" else "C")
        X.flags.writeable = False
    check(X, STACK)
    check(list(X), STACK)
    check(X.reshape(3, -1), STACK, image_shape=(6, 5, 3))


def test_x_is_never_changed() -> None:
    for dtype in (np.uint8, np.float32, np.int8):
        X = STACK.astype(dtype)
        before = X.copy()
        images = Mean(pixel_range=(-200, 300)).images(X)
        images[0].putpixel((0, 0), (1, 2, 3))
        np.testing.assert_array_equal(X, before)


# Flattened images


def test_image_shape() -> None:
    check(GREY.reshape(3, 30), three(GREY), image_shape=(6, 5))
    check(GREY.reshape(3, 30), three(GREY), image_shape=(6, 5, 1))
    check(
        STACK.reshape(3, 90).tolist(),
        STACK,
        image_shape=(6, 5, 3),
        pixel_range=(0, 255),
    )
    check(GREY[:, :5].reshape(3, 25), three(GREY[:, :5]))
    check(STACK[:, :5].reshape(3, 75), STACK[:, :5])
    check(pd.DataFrame(GREY[:, :5].reshape(3, 25)), three(GREY[:, :5]))
    check(np.uint8([[7], [9]]), [[[[7] * 3]], [[[9] * 3]]])
    check(np.uint8([[1, 2, 3]]), [[[[1, 2, 3]]]])


def test_strip_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match="30 features.* one pixel high. Set image_sh"
    ) as w:
        images = Mean().pictures(GREY.reshape(3, 30))
    assert len(w) == 1
    assert images[0].size == (30, 1)


def test_image_shape_that_does_not_fit() -> None:
    message = r"30 features, but image_shape=\(6, 5, 3\) makes 6 x 5 x 3 = 90"
    with pytest.raises(ValueError, match=message):
        Mean(image_shape=(6, 5, 3)).fit(GREY.reshape(3, 30))


@pytest.mark.parametrize(
    "image_shape", ["square", (6,), (6, 5, 2), (0, 5), (6.0, 5), 30, None, (1, 6, 5, 1)]
)
def test_image_shape_that_is_none(image_shape: object, paths: list[str]) -> None:
    with pytest.raises(ValueError, match=r"image_shape must be 'auto', \(height"):
        Mean(image_shape=image_shape).fit(paths)


# Black and white


@pytest.mark.parametrize(
    ("dtype", "pixel_range", "low", "high"),
    [
        (np.uint8, (10, 200), 10, 200),
        (np.uint16, "auto", 0, 65535),
        (np.int8, "auto", -128, 127),
        (np.int16, "auto", -32768, 32767),
        (np.int64, (0, 255), 0, 255),
        (np.float64, "auto", 0, 1),
        (np.float16, (-1, 1), -1, 1),
        (np.float32, [0, 16], 0, 16),
    ],
)
def test_pixel_range(dtype: type, pixel_range: object, low: float, high: float) -> None:
    X = (low + RNG.random((2, 5, 5)) * (high - low)).astype(dtype)
    scaled = (X.astype(np.float64) - low) / (high - low) * 255
    expected = three(np.round(scaled).clip(0, 255))
    check(X, expected, pixel_range=pixel_range)
    check(list(X), expected, pixel_range=pixel_range)
    check(X.reshape(2, 25), expected, pixel_range=pixel_range)


@pytest.mark.parametrize("pixel_range", ["auto", (0, 255)])
def test_booleans_are_black_and_white(pixel_range: object) -> None:
    X = GREY > 127
    expected = three(X * np.uint8(255))
    for form in (X, X[..., np.newaxis], list(X), torch.from_numpy(X)):
        check(form, expected, pixel_range=pixel_range)
    check(X.reshape(3, 30), expected, pixel_range=pixel_range, image_shape=(6, 5))


@pytest.mark.parametrize(
    ("X", "pixel_range", "message"),
    [
        (
            np.float32([[[0, 2]], [[-1, 3]]]),
            "auto",
            "^X has values from -1 to 3;.*0, 1",
        ),
        (np.uint8([[[0, 99]]]), (10, 20), r"^X has values from 0 to 99;.*\(10, 20\)"),
        (
            [np.zeros((1, 1)), np.full((1, 2), 7.0)] * 3,
            "auto",
            r"^X\[1\] has values from 7",
        ),
        (np.zeros((2, 4, 5), np.int64), "auto", "^X has dtype int64.*full range"),
        ([np.zeros((1, 1), np.uint32)] * 3, "auto", r"^X\[0\] has dtype uint32.*full"),
    ],
)
def test_values_out_of_range_are_warned_of_once(X, pixel_range, message) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        images = Mean(pixel_range=pixel_range).images(X)
    decoded(images)  # from here on a warning is an error
    assert len(caught) == 1
    assert "Set pixel_range=" in str(caught[0].message)


def test_values_out_of_range_are_clipped() -> None:
    with pytest.warns(UserWarning, match="clipped"):
        images = Mean().pictures(np.float64([[[-5, 0, 0.2, 1, 99]]]))
    assert np.asarray(images[0])[0, :, 0].tolist() == [0, 0, 51, 255, 255]


@pytest.mark.parametrize(
    "pixel_range",
    [(1, 0), (3, 3), (0,), (0, np.inf), (np.nan, 1), ("0", "1"), None, "a"],
)
def test_pixel_range_that_is_none(pixel_range: object) -> None:
    with pytest.raises(
        ValueError, match="pixel_range must be 'auto' or the finite val"
    ):
        Mean(pixel_range=pixel_range).fit(STACK)


# What is refused


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ("a.png", r"single str.* \[X\]"),
        (".", r"the folder '\.'\. Pass load_files"),
        (b"\x89PNG", r"single bytes.* \[X\]"),
        (Path("a.png"), r"single \w*Path.* \[X\]"),
        (Image.new("L", (2, 2)), r"single Image.* \[X\]"),
        ({"a": 1}, r"got dict.* list\(X\)"),
        ({"a.png"}, r"got set.* list\(X\)"),
        (iter(["a.png"]), r"got list_iterator.* list\(X\)"),
        ((path for path in ["a.png"]), r"got generator.* list\(X\)"),
    ],
)
def test_what_is_no_sequence(X: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Mean().fit(X)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, r"X\[1\] is missing \(None\)"),
        (float("nan"), r"X\[1\] is missing \(nan\)"),
        (np.float32("nan"), r"X\[1\] is missing"),
        (pd.NA, r"X\[1\] is missing \(<NA>\)"),
        (pd.NaT, r"X\[1\] is missing \(NaT\)"),
        ("", r"X\[1\] is missing \(''\)"),
        (b"", r"X\[1\] is missing \(b''\)"),
        (3, r"X\[1\] is of type int, not an image"),
        (np.int64(3), r"X\[1\] is of type int64, not an image"),
        ({"bytes": b""}, r"X\[1\] is of type dict, not an image"),
        ([1, 2], r"X\[1\] is of type list, not an image"),
        ("https://a.b/c.png", r"X\[1\] \('https://a.b/c.png'\) is a URL"),
        ("S3://bucket/c.png", r"X\[1\] .* is a URL"),
        ("data:image/png;base64,AA", r"X\[1\] .* is a URL"),
        (np.zeros(4), r"X\[1\] has shape \(4,\); one image must"),
        (np.zeros((2, 2, 2)), r"X\[1\] has shape \(2, 2, 2\); one image must"),
        (torch.zeros(3, 8, 8), r"X\[1\] has shape \(3, 8, 8\).*permute\(1, 2, 0\)"),
        (np.zeros((0, 4)), r"X\[1\] has no pixels"),
        (np.full((2, 2), np.nan), r"X\[1\] contains NaN or infinity"),
        (np.full((2, 2), -np.inf), r"X\[1\] contains NaN or infinity"),
        (np.full((2, 2), 1j), r"X\[1\] has dtype complex128"),
        (np.full((2, 2), "a"), r"X\[1\] has dtype <U1"),
        (torch.zeros(2, 2, requires_grad=True), r"X\[1\] is a tensor.*detach\(\)\.cpu"),
        (torch.zeros(2, 2, device="meta"), r"X\[1\] is a tensor.*detach\(\)\.cpu"),
        (torch.zeros(2, 2).bfloat16(), r"X\[1\] is a tensor.*\.float\(\)"),
    ],
)
def test_row_that_is_no_image(bad: object, message: str) -> None:
    X = np.array(["a.png", None, "c.png"], dtype=object)
    X[1] = bad
    for form in (X, X.tolist() if not isinstance(bad, np.generic) else list(X)):
        with pytest.raises(ValueError, match=message):
            Mean().fit(form)


@pytest.mark.parametrize("missing", [None, pd.NA, np.nan])
def test_missing_value_in_a_column(missing: object) -> None:
    for dtype in ("string", "str", "category", object):
        column = pd.Series(["a.png", missing], dtype=dtype)
        for X in (column, column.to_frame("path")):
            with pytest.raises(ValueError, match=r"X\[1\] is missing"):
                Mean().fit(X)
    with pytest.raises(ValueError, match=r"X\[1\] is missing \(None\)"):
        Mean().fit(pl.Series(["a.png", None]))


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((9, 3, 8, 8)), r"\(9, 3, 8, 8\).*transpose\(0, 2, 3, 1\)"),
        (torch.zeros(9, 1, 8, 8), r"\(9, 1, 8, 8\).*permute\(0, 2, 3, 1\)"),
        (np.zeros((9, 8, 8, 2)), r"\(9, 8, 8, 2\).*channels last\.$"),
        (np.zeros((8, 8, 3)), r"looks like one colour image.*X\[np\.newaxis\]"),
        (np.zeros((8, 8, 4)), r"looks like one colour image"),
        (np.zeros((2, 0, 8)), "no pixels"),
        (np.zeros((2, 2, 8, 8, 3)), r"\(2, 2, 8, 8, 3\); a stack of images must"),
        (torch.zeros(2, 4, requires_grad=True), r"^X is a tensor.*detach\(\)\.cpu"),
        (np.array([b"a\0", b"b"]), "dtype 'S', which cuts zero bytes"),
        (np.array([[b"a\0"], [b"b"]]), "dtype 'S', which cuts zero bytes"),
        (np.array([[1, 2]], dtype="M8[s]"), "X has dtype datetime64"),
    ],
)
@pytest.mark.filterwarnings("ignore:X has 2 features")
def test_array_that_is_no_stack(X: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mean().fit(X)


# Decoding when asked


def test_no_file_is_opened_before_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"/nowhere/{i}.png" for i in range(1000)]
    with monkeypatch.context() as patch:
        patch.delattr("builtins.open")
        patch.delattr("os.stat")
        forms = [
            names,
            np.array(names),
            pd.DataFrame({"path": names}),
            pl.Series(names),
        ]
        images = [Mean().images(X, reset=True) for X in forms]
    for each in images:
        assert len(each) == 1000
        with pytest.raises(
            ValueError, match=r"X\[999\] \('/nowhere/999.png'\) .* No su"
        ):
            each[999]


def test_rows_stay_as_they_are(paths: list[str]) -> None:
    column = pd.Series(paths, dtype="string")
    images = Mean().pictures(column)
    assert images._rows is column.array
    assert Mean().pictures(paths)._rows is paths


def test_threads_may_ask_at_once(paths: list[str]) -> None:
    images = Mean().pictures(pl.Series(paths * 20))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(images.__getitem__, range(len(images))))
    for row, image in enumerate(results):
        np.testing.assert_array_equal(np.asarray(image), STACK[row % 3])


def test_end_of_the_sequence(paths: list[str]) -> None:
    for X in (paths, STACK, pd.Series(paths), pl.Series(paths), STACK[..., 0]):
        assert len(list(Mean().images(X))) == len(paths)


def test_torch_is_not_imported() -> None:
    code = "import sys, sktl._images.validation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_integers_that_allow_for_missing_values_stay_integers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16), dtype=np.uint8)
    frame = pd.DataFrame(pixels, columns=list("abcdefghijklmnop"))
    expected = validate_images(frame, estimator=Mean(), reset=True)
    got = validate_images(frame.astype("UInt8"), estimator=Mean(), reset=True)
    for row in range(3):
        assert np.array_equal(got[row], expected[row])


def test_stacks_of_objects_are_refused() -> None:
    X = np.zeros((2, 4, 4, 3), dtype=object)
    with pytest.raises(ValueError, match=r"dtype object.* np\.stack"):
        validate_images(X, estimator=Mean(), reset=True)


def test_a_path_below_a_missing_one_still_asks_for_a_column() -> None:
    table = pd.DataFrame({"path": [None, "a.jpg"], "altitude": [1, 2]})
    with pytest.raises(ValueError, match="one column can be used at a time"):
        validate_images(table, estimator=Mean(), reset=True)


def test_for_another_directory_paths_are_absolute(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(paths[0]).parent
    monkeypatch.chdir(folder)
    X = [Path(paths[0]).name, Path(Path(paths[1]).name), paths[2], STACK[2]]
    images = validate_images(X, estimator=Mean(), reset=True).subset([3, 1, 0, 2])
    expected = [np.asarray(image) for image in images]
    there = images.portable()
    monkeypatch.chdir(tmp_path.parent)
    for position, image in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(there[position]), image)
    assert [there.original_index(position) for position in range(4)] == [3, 1, 0, 2]


def test_what_a_image_loses_when_it_is_pickled_is_settled_before() -> None:
    palette = Image.fromarray(STACK[0]).convert("RGBA")
    palette.putalpha(90)
    turned = Image.fromarray(STACK[1])
    turned.getexif()[274] = 6  # by a quarter
    tensors = torch.from_numpy(np.repeat(STACK[:2], 100, axis=0))
    X = [palette.quantize(), turned, Image.fromarray(STACK[2]).convert("L"), *tensors]
    images = validate_images(X, estimator=Mean(), reset=True)
    some = images.subset(range(5))
    there = pickle.loads(pickle.dumps(some.portable()))
    for position in range(5):
        expected = np.asarray(some[position])
        np.testing.assert_array_equal(np.asarray(there[position]), expected)
    assert there.content_hashes() == some.content_hashes()
    assert len(pickle.dumps(images.subset([3, 4]).portable())) < 20 * STACK[0].nbytes
