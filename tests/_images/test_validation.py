"""Each supported form of X is decoded to the same pixels; unsupported forms raise."""

import pickle
import re
import subprocess
import sys
from collections import deque
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
from mean_color import (
    GREY,
    STACK,
    MeanColor,
    check_images,
    decode_all,
    encode_png,
    repeat_grey,
    save_stack,
)
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_files
from sklearn.utils.estimator_checks import estimator_checks_generator

from sktl._images.validation import validate_images

BYTES = {"pixel_range": (0, 255)}


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Return the paths of three PNG files with the pixels of STACK."""
    return save_stack(tmp_path)


# Conventions of scikit-learn


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_estimator_checks_of_scikit_learn() -> None:
    names = set()
    for estimator, check_ in estimator_checks_generator(MeanColor()):
        name = getattr(check_, "func", check_).__name__
        if name != "check_array_api_input":  # needs an environment variable at import
            check_(estimator)
            names.add(name)
    assert len(names) > 35
    assert {"check_n_features_in", "check_fit1d", "check_dtype_object"} <= names


def test_invalid_arrays_raise_errors_of_scikit_learn() -> None:
    mean = MeanColor()
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
def test_empty_input_raises(X: object) -> None:
    message = "Found array with 0 sample(s) (shape=(0,)) while a minimum of 1 is req"
    advice = "uired by MeanColor. If X comes from load_files, the images must be in one"
    with pytest.raises(ValueError, match=re.escape(message + advice)):
        MeanColor().fit(X)


def test_folder_without_folders_of_classes_raises(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "1.jpg")
    X = load_files(tmp_path, load_content=False).filenames
    with pytest.raises(
        ValueError, match=r"0 sample\(s\).*one folder per class\. .*glob"
    ):
        MeanColor().fit(X)
    MeanColor().fit(sorted(tmp_path.glob("*.jpg")))


@pytest.mark.parametrize(
    "X",
    [
        np.empty((0, 4)),
        np.empty((0, 4, 4, 3)),
        pl.Series("p", [], pl.String).to_frame(),
    ],
)
def test_table_or_stack_without_rows_raises(X: object) -> None:
    with pytest.raises(ValueError, match=r"0 sample\(s\).* by MeanColor"):
        MeanColor().fit(X)


def test_feature_attributes_are_those_of_the_last_fit(paths: list[str]) -> None:
    mean = MeanColor().fit(np.zeros((2, 16)))
    assert mean.n_features_in_ == 16
    with pytest.raises(ValueError, match="9 features, but MeanColor is expecting 16"):
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
        mean.transform(STACK[:, :3])  # of any size


def test_invalid_input_does_not_change_feature_attributes() -> None:
    mean = MeanColor().fit(np.zeros((2, 16)))
    for X in (["http://x/y.png"], np.zeros((2, 5, 5, 2)), [None]):
        with pytest.raises(ValueError, match="X"):
            mean.fit(X)
    assert mean.n_features_in_ == 16


# Forms of X

PIXELS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 4]))


@pytest.mark.filterwarnings("ignore:.* has four channels, and the fourth")
@pytest.mark.filterwarnings("ignore:.* is transparent everywhere")
@pytest.mark.filterwarnings("ignore:The largest value")  # drawn images may be dark
@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint8, PIXELS))
def test_same_image_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray
) -> None:
    file = encode_png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    path = tmp_path_factory.getbasetemp() / "image.png"
    path.write_bytes(file)
    with Image.open(path) as image:
        forms = [path, str(path), file, image, pixels, torch.from_numpy(pixels)]
        first, *others = decode_all(MeanColor().validate(forms))
    for other in others:
        np.testing.assert_array_equal(other, first)
    check_images(pixels[np.newaxis], [first])
    check_images(torch.from_numpy(pixels)[None], [first])
    check_images(pixels.reshape(1, -1), [first], image_shape=pixels.shape)


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
    check_images(container(paths), STACK)


def test_column_selected_by_column_transformer(paths: list[str]) -> None:
    X = {"price": [1, 2, 3], "path": paths}
    columns = ColumnTransformer([("images", MeanColor(), ["path"])])
    expected = STACK.mean((1, 2), dtype=np.float64)
    for table in (pd.DataFrame(X), pl.DataFrame(X)):
        np.testing.assert_allclose(columns.fit_transform(table), expected, rtol=1e-6)
    for table in (pd.DataFrame(X), pl.DataFrame(X), pd.DataFrame(X).to_numpy()):
        with pytest.raises(ValueError, match=r"Got 2 columns.* Select one"):
            MeanColor().fit(table)


def test_images_of_all_sizes_and_channels() -> None:
    grey, color = GREY[0], STACK[1]
    opaque = np.dstack([STACK[2], np.full((6, 5), 255, np.uint8)])
    X = [grey, grey[:2, :3, np.newaxis], color[::-1, ::2], opaque]
    expected = [
        repeat_grey(grey),
        repeat_grey(grey[:2, :3]),
        color[::-1, ::2],
        STACK[2],
    ]
    check_images(X, expected)
    clear = np.zeros((1, 2, 3, 4), np.uint8)
    clear[:, 0, 0, 3] = 255
    expected = np.full((1, 2, 3, 3), 255)  # transparent black on white
    expected[:, 0, 0] = 0
    check_images(clear, expected)


@pytest.mark.parametrize("kind", ["F", "read-only", "memmap", "negative strides"])
def test_any_memory_layout(kind: str, tmp_path: Path) -> None:
    if kind == "memmap":
        np.save(tmp_path / "x.npy", STACK)
        X = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif kind == "negative strides":
        X = STACK[:, ::-1].copy()[:, ::-1]
    else:
        X = STACK.copy(order="F" if kind == "F" else "C")
        X.flags.writeable = False
    check_images(X, STACK)
    check_images(list(X), STACK)
    check_images(X.reshape(3, -1), STACK, image_shape=(6, 5, 3))


def test_nullable_integers_stay_integers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16), dtype=np.uint8)
    frame = pd.DataFrame(pixels, columns=list("abcdefghijklmnop"))
    expected = validate_images(frame, estimator=MeanColor(), reset=True)
    got = validate_images(frame.astype("UInt8"), estimator=MeanColor(), reset=True)
    for index in range(3):
        assert np.array_equal(got[index], expected[index])


# Flattened images


def test_image_shape() -> None:
    check_images(GREY.reshape(3, 30), repeat_grey(GREY), image_shape=(6, 5))
    check_images(GREY.reshape(3, 30), repeat_grey(GREY), image_shape=(6, 5, 1))
    check_images(
        STACK.reshape(3, 90).tolist(),
        STACK,
        image_shape=(6, 5, 3),
        pixel_range=(0, 255),
    )
    check_images(GREY[:, :5].reshape(3, 25), repeat_grey(GREY[:, :5]))
    check_images(pd.DataFrame(GREY[:, :5].reshape(3, 25)), repeat_grey(GREY[:, :5]))
    check_images(np.uint8([[7], [99]]), [[[[7] * 3]], [[[99] * 3]]])
    check_images(np.uint8([[1, 2, 3]]), [[[[1, 2, 3]]]])


def test_rows_of_square_color_images_warn_of_their_layout() -> None:
    rows = STACK[:, :5].reshape(3, 75)
    message = r"75 features.*of 5 x 5 pixels with the channels last.*\(3, 5, 5\) if all"
    with pytest.warns(UserWarning, match=message) as w:
        images = decode_all(MeanColor().validate(rows))
    assert len(w) == 1
    np.testing.assert_array_equal(images, STACK[:, :5])
    check_images(rows, STACK[:, :5], image_shape=(5, 5, 3))  # without a warning


@pytest.mark.parametrize("n_channels", [1, 3, 4])
def test_rows_with_the_channels_first(n_channels: int) -> None:
    stack = np.concatenate([STACK, np.full_like(STACK[..., :1], 255)], axis=3)
    stack = stack[..., -n_channels:]
    rows = torch.from_numpy(stack).permute(0, 3, 1, 2).flatten(1)
    expected = decode_all(MeanColor().validate(stack))
    check_images(rows, expected, image_shape=(n_channels, 6, 5))
    check_images(rows.tolist(), expected, image_shape=[n_channels, 6, 5], **BYTES)
    images = MeanColor(image_shape=(n_channels, 6, 5)).validate(rows)
    assert images.content_hashes() == MeanColor().validate(stack).content_hashes()
    portable = pickle.loads(pickle.dumps(images.subset([2, 0]).portable()))
    np.testing.assert_array_equal(decode_all(portable), [expected[2], expected[0]])


def test_image_one_pixel_high_warns() -> None:
    with pytest.warns(
        UserWarning, match=r"30 features.* one pixel high. Set image_sh.*\(channels, "
    ) as w:
        images = MeanColor().validate(GREY.reshape(3, 30))
    assert len(w) == 1
    assert images[0].size == (30, 1)


def test_image_shape_of_wrong_size_raises() -> None:
    message = r"30 features, but image_shape=\(6, 5, 3\) requires 6 x 5 x 3 = 90"
    with pytest.raises(ValueError, match=message):
        MeanColor(image_shape=(6, 5, 3)).fit(GREY.reshape(3, 30))
    message = r"30 features, but image_shape=\(3, 6, 5\) requires 3 x 6 x 5 = 90"
    with pytest.raises(ValueError, match=message):
        MeanColor(image_shape=(3, 6, 5)).fit(GREY.reshape(3, 30))


@pytest.mark.parametrize(
    "image_shape",
    ["square", (6,), (6, 5, 2), (2, 6, 5), (0, 5), (6.0, 5), 30, None, (1, 6, 5, 1)],
)
def test_invalid_image_shape_raises(image_shape: object, paths: list[str]) -> None:
    with pytest.raises(ValueError, match=r"image_shape must be 'auto', \(height"):
        MeanColor(image_shape=image_shape).fit(paths)


# Unsupported input


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ("a.png", r"single str.* \[X\]"),
        (".", r"the folder '\.'\. Pass load_files"),
        (b"\x89PNG", r"single bytes.* \[X\]"),
        (Path("a.png"), r"single \w*Path.* \[X\]"),
        (Image.new("L", (2, 2)), r"single Image.* \[X\]"),
        ({"a": 1}, r"Got dict.* list\(X\)"),
        ({"a.png"}, r"Got set.* list\(X\)"),
        (iter(["a.png"]), r"Got list_iterator.* list\(X\)"),
        ((path for path in ["a.png"]), r"Got generator.* list\(X\)"),
    ],
)
def test_X_that_is_not_a_sequence_raises(X: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MeanColor().fit(X)


@pytest.mark.parametrize(
    ("element", "message"),
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
def test_element_that_is_not_an_image_raises(element: object, message: str) -> None:
    X = np.array(["a.png", None, "c.png"], dtype=object)
    X[1] = element
    for form in (X, X.tolist() if not isinstance(element, np.generic) else list(X)):
        with pytest.raises(ValueError, match=message):
            MeanColor().fit(form)


@pytest.mark.parametrize("missing", [None, pd.NA, np.nan])
def test_missing_value_in_a_column_raises(missing: object) -> None:
    for dtype in ("string", "str", "category", object):
        column = pd.Series(["a.png", missing], dtype=dtype)
        for X in (column, column.to_frame("path")):
            with pytest.raises(ValueError, match=r"X\[1\] is missing"):
                MeanColor().fit(X)
    with pytest.raises(ValueError, match=r"X\[1\] is missing \(None\)"):
        MeanColor().fit(pl.Series(["a.png", None]))


def test_path_below_a_missing_value_still_raises() -> None:
    table = pd.DataFrame({"path": [None, "a.jpg"], "altitude": [1, 2]})
    with pytest.raises(ValueError, match="must have a single column"):
        validate_images(table, estimator=MeanColor(), reset=True)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((9, 3, 8, 8)), r"\(9, 3, 8, 8\).*transpose\(0, 2, 3, 1\)"),
        (torch.zeros(9, 1, 8, 8), r"\(9, 1, 8, 8\).*permute\(0, 2, 3, 1\)"),
        (np.zeros((9, 8, 8, 2)), r"\(9, 8, 8, 2\).*channels last\.$"),
        (np.zeros((8, 8, 3)), r"looks like one color image.*X\[np\.newaxis\]"),
        (np.zeros((8, 8, 4)), r"looks like one color image"),
        (np.zeros((2, 0, 8)), "no pixels"),
        (np.zeros((2, 2, 8, 8, 3)), r"\(2, 2, 8, 8, 3\); a stack of images must"),
        (torch.zeros(2, 4, requires_grad=True), r"^X is a tensor.*detach\(\)\.cpu"),
        (np.array([b"a\0", b"b"]), "dtype 'S', which strips trailing zero bytes"),
        (np.array([[b"a\0"], [b"b"]]), "dtype 'S', which strips trailing zero bytes"),
        (np.array([[1, 2]], dtype="M8[s]"), "X has dtype datetime64"),
    ],
)
@pytest.mark.filterwarnings("ignore:X has 2 features")
def test_array_that_is_not_a_stack_raises(X: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanColor().fit(X)


def test_stack_of_objects_raises() -> None:
    X = np.zeros((2, 4, 4, 3), dtype=object)
    with pytest.raises(ValueError, match=r"dtype object.* np\.stack"):
        validate_images(X, estimator=MeanColor(), reset=True)


def test_torch_is_not_imported() -> None:
    code = "import sys, sktl._images.validation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
