"""Properties that hold for any images, labels and parameters, drawn by hypothesis.

The same cases are drawn in every run: few by default, many under the mark ``slow``.
"""

import io
import pickle
from dataclasses import dataclass

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import normalized
from shared_fixtures import FIXED, TinyNet
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from torch import nn

from sktl import (
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedClassifier,
    PretrainedFeatures,
    register_backbone,
)
from sktl._backbones.registry import load_backbone


def holds_for_all(max_examples, *strategies):
    """Return a decorator that calls a property with so many drawn values."""
    return lambda check: settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],  # shrinking a failing case can take minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(*strategies)(check))()


# Drawn images may be dark, or transparent everywhere.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The largest value"),
    pytest.mark.filterwarnings("ignore:.* is transparent everywhere"),
    pytest.mark.filterwarnings("ignore:.* has four channels, and the fourth"),
]


def few_and_many(few, many):
    """Parametrize the number of examples of a property."""
    return pytest.mark.parametrize(
        "n", [few, pytest.param(many, marks=pytest.mark.slow)]
    )


class RoundsByBatch(nn.Module):
    """Layer whose last bits depend on the batch size, as those of larger networks."""

    def forward(self, x):
        return x * (1 + len(x) * 2.0**-22)


def build_rounding():
    """Build the small network with such a layer."""
    network = TinyNet()
    network.stages["stem"].append(RoundsByBatch())
    return network


def build_ten_categories() -> nn.Module:
    """Build a small network with ten outputs."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


register_backbone("rounding", build_rounding, preprocessing=Preprocessing(16, 16))
register_backbone(
    "of ten categories",
    build_ten_categories,
    preprocessing=Preprocessing(16, 16),
    categories=tuple("jihgfedcba"),
)


# Any images in any containers

DTYPES = [np.uint8, np.uint16, np.float32, np.float64, np.bool_]


@dataclass(frozen=True, eq=False)
class RandomImage:
    """Pixels of any dtype and shape, and the expected RGB pixels."""

    pixels: np.ndarray
    rgb: np.ndarray

    def file(self):
        """Return a PNG file; None if PNG does not support the pixels."""
        if self.pixels.dtype.kind == "f" or (
            self.pixels.dtype != np.uint8 and self.pixels.shape[2:] not in [(), (1,)]
        ):
            return None
        buffer = io.BytesIO()
        self.image().save(buffer, "PNG")
        return buffer.getvalue()

    def image(self):
        """Return a PIL image."""
        one = self.pixels.shape[2:] == (1,)
        return Image.fromarray(self.pixels[..., 0] if one else self.pixels)


def make_image(seed, height, width, n_channels, dtype):
    """Return random pixels; alpha is 0 or the maximum, and not 0 everywhere."""
    shape = (height, width, n_channels) if n_channels else (height, width)
    unit = np.random.default_rng(seed).random(shape)
    unit[..., 3:] = unit[..., 3:] > 0.5
    if n_channels == 4:
        unit[height // 2, width // 2, 3] = 1
    white = {"b": 1, "f": 1}.get(np.dtype(dtype).kind) or np.iinfo(dtype).max
    pixels = (np.rint(unit * white) if np.dtype(dtype).kind in "bu" else unit).astype(
        dtype
    )
    rgb = np.rint(pixels.astype(np.float64) / white * 255)
    rgb = rgb if n_channels else rgb[..., None]
    if n_channels == 4:
        rgb = np.where(rgb[..., 3:] == 0, 255, rgb[..., :3])
    return RandomImage(
        pixels, np.broadcast_to(rgb, (height, width, 3)).astype(np.uint8)
    )


images_drawn = st.builds(
    make_image,
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0, 1, 3, 4]),
    st.sampled_from(DTYPES),
)

FORMS = {
    "path": lambda image, folder: str(saved(image, folder)),
    "Path": lambda image, folder: saved(image, folder),
    "bytes": lambda image, folder: image.file(),
    "PIL": lambda image, folder: image.image(),
    "array": lambda image, folder: image.pixels,
    "tensor": lambda image, folder: torch.from_numpy(image.pixels),
}


def forms_of(image):
    """Return the forms in which an image can be passed."""
    if image.file() is not None:
        return list(FORMS)
    return ["array", "tensor"]


def saved(image, folder):
    """Write an image to a file, once, and return its path."""
    path = folder / f"{id(image)}.png"
    if not path.exists():
        path.write_bytes(image.file())
    return path


def key_of(form, row, image):
    """Return a key that is equal for images with the same content hash."""
    if form in ("path", "Path", "bytes"):
        return image.file()
    pixels = image.rgb if form == "PIL" else image.pixels
    return pixels.dtype.str, pixels.shape, pixels.tobytes()


def object_array(rows):
    """Return a one-dimensional array of objects of any shape."""
    out = np.empty(len(rows), dtype=object)
    out[:] = [None] * len(rows)
    for i, row in enumerate(rows):
        out[i] = row
    return out


def held_by(kind, rows):
    """Return a container of the rows; a list if it does not support them."""
    if kind in ("polars Series", "polars frame"):
        if not {type(row) for row in rows} <= {str} | {bytes}:
            return list(rows)
        if len({type(row) for row in rows}) > 1:
            return list(rows)
        series = pl.Series("image", rows)
        return series if kind == "polars Series" else series.to_frame()
    if kind == "stack":
        if not all(isinstance(row, np.ndarray) for row in rows):
            return list(rows)
        alike = len({(row.shape, row.dtype) for row in rows}) == 1
        # (n, h, 3) looks like one color image, and raises.
        if not alike or (rows[0].ndim == 2 and rows[0].shape[1] in (3, 4)):
            return list(rows)
        return np.stack(rows)
    return {
        "list": list,
        "tuple": tuple,
        "object array": object_array,
        "column": lambda rows: object_array(rows)[:, None],
        "pandas Series": lambda rows: pd.Series(
            object_array(rows), index=range(7, 7 + len(rows))
        ),
        "pandas frame": lambda rows: pd.DataFrame({"image": object_array(rows)}),
    }[kind](rows)


CONTAINERS = [
    "list",
    "tuple",
    "object array",
    "column",
    "pandas Series",
    "pandas frame",
    "polars Series",
    "polars frame",
    "stack",
]


def plain_row(image, layer):
    """Compute the features of one image with torch only."""
    backbone = load_backbone("rounding")
    x = normalized([image.rgb], backbone.preprocessing)
    stem, stage1 = backbone.network.stages.values()
    with torch.inference_mode():
        x = stem(x)
        x = x if layer == "stem" else stage1(x)
    return x.mean((2, 3)).numpy()[0]


def close(got, expected):
    """Check equality up to 1e-5 of the largest value, as across batch sizes."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that creates a new folder."""
    return lambda: tmp_path_factory.mktemp("drawn")


@few_and_many(4, 200)
def test_row_depends_on_its_image_only(n, folders):
    @holds_for_all(n, st.data())
    def check(data):
        check_rows(data.draw, folders())


def check_rows(draw, folder):
    """Transform images drawn in calls of any kind, and compare rows with plain ones."""
    pool = draw(st.lists(images_drawn, min_size=1, max_size=5))
    if draw(st.booleans()):  # of the same shape, so that they can be stacked
        one = pool[0].pixels
        pool = [
            make_image(i, *one.shape[:2], (*one.shape, 0)[2], one.dtype.type)
            for i in range(len(pool))
        ]
    chosen = draw(st.lists(st.sampled_from(range(len(pool))), min_size=1, max_size=14))
    one_form = draw(st.sampled_from([None, "array", "bytes", "path"]))
    forms = [
        one_form
        if one_form in forms_of(pool[i])
        else draw(st.sampled_from(forms_of(pool[i])))
        for i in chosen
    ]
    rows = [FORMS[form](pool[i], folder) for form, i in zip(forms, chosen, strict=True)]
    keys = [
        key_of(form, row, pool[i])
        for form, row, i in zip(forms, rows, chosen, strict=True)
    ]
    layer = draw(st.sampled_from(["stem", "penultimate"]))
    plain = PretrainedFeatures("rounding", engine="torch", layer=layer)
    plain.set_params(batch_size=draw(st.sampled_from([1, 3, 8])))
    expected = np.stack([plain_row(pool[i], layer) for i in chosen])
    # Expected bits in calls with at least batch_size images.
    many = plain.transform([image.pixels for image in pool] * 8)
    padded = many[: len(pool)][chosen]
    close(padded, expected)
    cached = {}
    state = draw(st.sampled_from(["no memory", "none cached", "some", "all"]))
    mine = clone(plain).set_params(n_jobs=draw(st.sampled_from([None, 1, 3])))
    if state != "no memory":
        mine.set_params(memory=folder / "store")
    if state in ("some", "all"):
        first = rows[: len(rows) // 2 or 1] if state == "some" else rows
        known = mine.transform(first)
        close(known, expected[: len(first)])
        for key, row in zip(keys, known, strict=False):
            cached.setdefault(key, row)
    # Splits in any order, each in another container.
    order = draw(st.permutations(range(len(rows))))
    cuts = draw(st.sets(st.integers(1, len(rows)), max_size=2))
    for part in np.split(np.array(order), sorted(cuts)):
        if not len(part):
            continue
        X = held_by(draw(st.sampled_from(CONTAINERS)), [rows[i] for i in part])
        got = mine.transform(X)
        assert got.dtype == np.float32
        for position, i in enumerate(part):
            if keys[i] in cached:
                np.testing.assert_array_equal(got[position], cached[keys[i]])
            elif len(part) >= mine.batch_size:
                np.testing.assert_array_equal(got[position], padded[i])
        close(got, expected[part])
        if mine.memory is not None:
            for position, i in enumerate(part):
                cached.setdefault(keys[i], got[position])


# Any labels

FEW = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)

TEXT = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12)
INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def of_dtype(code):
    """Draw integral values of a NumPy dtype."""
    dtype = np.dtype(code)
    if dtype.kind == "f":
        return st.integers(-2000, 2000).map(dtype.type)
    limits = np.iinfo(dtype)
    return st.integers(int(limits.min), int(limits.max)).map(dtype.type)


KINDS_OF_LABELS = {
    "str": TEXT,
    "int": st.integers(-(2**63), 2**63 - 1),
    "bool": st.booleans(),
    "float": st.integers(-(2**40), 2**40).map(float),
    "np.str_": TEXT.map(np.str_),
    "np.bool_": st.booleans().map(np.bool_),
    **{code: of_dtype(code) for code in [*INTEGERS, "f2", "f4", "f8"]},
}
CONTAINERS_OF_LABELS = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "object array": object_array,
    "Series": pd.Series,
    "category": lambda y: pd.Series(y, dtype="category"),
    "object Series": lambda y: pd.Series(y, dtype=object),
    "polars": lambda y: pl.Series(np.array(y).tolist()),
}


@st.composite
def labels(draw, n=10):
    """Draw labels of n images, of two to four classes that all occur."""
    kind = draw(st.sampled_from(sorted(KINDS_OF_LABELS)))
    classes = draw(st.lists(KINDS_OF_LABELS[kind], min_size=2, max_size=4, unique=True))
    more = draw(
        st.lists(
            st.sampled_from(classes),
            min_size=n - len(classes),
            max_size=n - len(classes),
        )
    )
    y = draw(st.permutations([*classes, *more]))
    containers = set(CONTAINERS_OF_LABELS)
    if "str" not in kind:
        containers -= {
            "object array",
            "object Series",
        }  # see test_labels_of_other_objects_raise
    if kind == "f2" or "bool" in kind:
        # pandas does not support float16, and scikit-learn converts booleans to floats.
        containers -= {"category"}
    return CONTAINERS_OF_LABELS[draw(st.sampled_from(sorted(containers)))](y)


def check_labels(fitted, y):
    """Check `classes_` and predictions against NumPy."""
    y = np.asarray(y)
    expected = np.unique(y)
    np.testing.assert_array_equal(fitted.classes_, expected)
    assert fitted.classes_.dtype == y.dtype
    predicted = fitted.predict(FEW)
    assert predicted.dtype == y.dtype
    assert set(predicted.tolist()) <= set(expected.tolist())
    proba = fitted.predict_proba(FEW)
    assert proba.shape == (len(FEW), len(expected))
    np.testing.assert_array_equal(predicted, expected[proba.argmax(1)])


@few_and_many(8, 80)
def test_labels_of_a_fine_tuned_classifier(n, folders):
    @holds_for_all(n, labels(), st.sampled_from([0, 1]))
    def check(y, max_epochs):
        mine = FineTunedCNNClassifier(
            "tiny",
            trainable="head",
            head_init="random",
            lr=1e-4,
            max_epochs=max_epochs,
            engine="torch",
            random_state=0,
        ).fit(FEW, y)
        check_labels(mine, y)
        check_labels(pickle.loads(pickle.dumps(mine)), y)
        path = folders() / "mine.safetensors"
        mine.save(path)
        check_labels(FineTunedCNNClassifier.load(path), y)


@few_and_many(8, 80)
def test_labels_of_a_pretrained_classifier(n):
    @holds_for_all(n, labels())
    def check(y):
        mine = PretrainedClassifier("of ten categories", engine="torch")
        check_labels(mine.fit(FEW, y), y)
        check_labels(pickle.loads(pickle.dumps(mine)), y)
        mine.set_params(label_map=dict(zip("abcdefghij", np.asarray(y), strict=True)))
        if np.asarray(y).dtype == object:
            return  # a label_map does not define the dtype of its labels
        check_labels(mine.fit(FEW), y)


@pytest.mark.parametrize("y", [[1, 2], [True, False], [1.0, 2.0]])
def test_labels_of_other_objects_raise(y):
    y = object_array(y * 5)
    with pytest.raises(ValueError, match="Unknown label type: unknown") as theirs:
        LogisticRegression().fit(FEW.reshape(10, -1), y)
    for mine in (FineTunedCNNClassifier("tiny"), PretrainedClassifier("resnet_mini")):
        with pytest.raises(ValueError, match="Unknown label type") as ours:
            mine.fit(FEW, y)
        assert str(ours.value) == str(theirs.value)


# Any parameters

COMMON = {
    "image_size": [None, 20],
    "resize": [None, "crop", "squash", "pad"],
    "pixel_range": ["auto", (0, 255), [-20, 300]],
    "reducing_gap": [None, 2, 3.5],
    "max_image_pixels": [10**6, np.int64(10**9)],
    "extra_formats": [(), ["TGA"], ("JPEG2000", "tga")],
    "batch_size": [1, 4, 32, np.int64(5)],
    "device": ["auto", "cpu", torch.device("cpu")],
    "n_jobs": [None, 1, 2],
    "memory": [None, "store"],
    "engine": ["torch"],
    "precision": ["float32", "bfloat16"],
    "image_shape": ["auto", (12, 12, 3)],
}
VALID = {
    PretrainedFeatures: {
        **COMMON,
        "backbone": ["tiny"],
        "weights": ["DEFAULT", None],
        "layer": ["penultimate", "stem", ["stem", "penultimate"]],
        "pooling": ["avg", "max", "gem", "flatten", 1, 2, np.int64(2)],
    },
    PretrainedClassifier: {
        **COMMON,
        "backbone": ["of ten categories"],
        "label_map": [None, {"a": 0, "c": 1}, {"a": 0, "b": 1, "j": 0}],
    },
    FineTunedCNNClassifier: {
        **COMMON,
        "backbone": ["tiny"],
        "weights": ["DEFAULT", None],
        "trainable": ["head", "all", 0, 1, "stage1", "stem"],
        "head_init": ["auto", "linear_probe", "random"],
        "hidden_layer_sizes": [(), 4, (4,), [4, 3]],
        "dropout": [0.0, 0.4],
        "optimizer": ["adamw", "sgd"],
        "lr": ["auto", 1e-4, 1e-2],
        "layer_decay": [1.0, 0.5],
        "weight_decay": [0.0, 1e-2],
        "lr_schedule": ["constant", "cosine", "onecycle"],
        "max_epochs": [0, 1, 2],
        "augmentation": [None, "flip", "standard", "trivial"],
        "augmentation_views": [None, 1, 2],
        "label_smoothing": [0.0, 0.1],
        "wise_ft_alpha": ["auto", 0, 0.4, 1.0],
        "class_weight": [None, "balanced", {0: 1, 1: 3}],
        "unfreeze_every": [None, 1],
        "early_stopping": [False, True],
        "validation_fraction": [0.2, 0.5],
        "n_iter_no_change": [1, 5],
        "warm_start": [False],
        "random_state": [0, 7, np.int64(3)],
    },
}


def output_of(fitted):
    """Return the features or the probabilities of an estimator."""
    if hasattr(fitted, "transform"):
        return fitted.transform(FEW)
    return fitted.predict_proba(FEW)


@pytest.mark.filterwarnings("ignore:precision='bfloat16' is slow")
@pytest.mark.usefixtures("quick_linear_probe")
@pytest.mark.parametrize("kind", VALID)
@few_and_many(2, 20)
def test_copies_fit_equal_models(n, folders, kind):
    values = {name: st.sampled_from(of) for name, of in VALID[kind].items()}

    @holds_for_all(n, st.fixed_dictionaries({}, optional=values))
    def check(params):
        check_copies(kind, params, folders)


def check_copies(kind, params, folders):
    """Compare an estimator with copies of it, before and after fit."""
    # Without defaults that download weights or are slow.
    params = {"backbone": VALID[kind]["backbone"][0], "engine": "torch", **params}
    if params.get("memory") == "store":
        params["memory"] = str(folders())
    if kind is FineTunedCNNClassifier:
        # The selection of settings trains several times, and is one of the values.
        defaults = {"random_state": 0, "validation_fraction": 0.2, "max_epochs": 1}
        params = {**FIXED, **defaults, **params}
    y = np.arange(len(FEW)) % 2
    made = kind(**params)
    expected = made.get_params()
    copies = {
        "set_params": kind().set_params(**params),
        "pickle": pickle.loads(pickle.dumps(made)),
    }
    rows = output_of(made.fit(FEW, y))
    assert made.get_params() == expected
    copies["clone"] = clone(made)
    for name, copied in copies.items():
        assert copied.get_params() == expected, name
        np.testing.assert_array_equal(output_of(copied.fit(FEW, y)), rows, name)
    fitted = pickle.loads(pickle.dumps(made))
    assert fitted.get_params() == expected
    np.testing.assert_array_equal(output_of(fitted), rows)
    for name, value in params.items():
        assert getattr(fitted, name) == value
