"""Invalid or unusual arrays, labels and weights, passed to each estimator.

Validation of images and targets is tested in `tests/_images/test_validation.py` and
`tests/_training/test_targets.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn
from estimators import ESTIMATORS, each_estimator, output_of
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils import resample

from sktl import (
    FeatureStore,
    FineTunedCNNClassifier,
    PretrainedClassifier,
    PretrainedFeatures,
)

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

CLASSIFIERS = ESTIMATORS[:2]
each_classifier = pytest.mark.parametrize("estimator", CLASSIFIERS)
RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
Y = np.arange(12) % 2


@each_estimator
@pytest.mark.parametrize("shape", [(12, 16), (12, 4, 5), (12, 4, 5, 3)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_raise(estimator, shape, value):
    X = RNG.random(shape)
    fitted = clone(estimator).fit(X, Y)
    X[3].flat[2] = value
    with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
        clone(estimator).fit(X, Y)
    with pytest.raises(ValueError, match=r"contains (NaN|infinity)"):
        output_of(fitted, X)
    with pytest.raises(ValueError, match=r"X\[3\] contains NaN or infinity"):
        output_of(fitted, list(X.reshape(12, 4, -1)))


@each_estimator
@pytest.mark.parametrize("n_channels", [2, 5, 0])
def test_invalid_number_of_channels_raises(estimator, n_channels):
    X = np.zeros((12, 8, 8, n_channels))
    with pytest.raises(ValueError, match=r"\(12, 8, 8, \d\).*(channels last|no pixel)"):
        clone(estimator).fit(X, Y)
    fitted = clone(estimator).fit(STACK, Y)
    with pytest.raises(ValueError, match=r"\(12, 8, 8, \d\)"):
        output_of(fitted, X)


@each_estimator
def test_channels_first_raise(estimator):
    fitted = clone(estimator).fit(STACK, Y)
    with pytest.raises(ValueError, match=r"transpose\(0, 2, 3, 1\)"):
        output_of(fitted, STACK.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"X\[0\].*transpose\(1, 2, 0\)"):
        output_of(fitted, list(STACK.transpose(0, 3, 1, 2)))


@each_estimator
def test_image_sizes_other_than_in_fit(estimator):
    fitted = clone(estimator).fit(STACK, Y)
    others = [np.kron(p, np.ones((k, 2, 1), np.uint8)) for k, p in enumerate(STACK, 1)]
    assert output_of(fitted, others).shape[0] == 12
    flat = clone(estimator).set_params(image_shape=STACK.shape[1:])
    flat.fit(STACK.reshape(12, -1), Y)
    np.testing.assert_array_equal(
        output_of(flat, STACK.reshape(12, -1)), output_of(fitted, STACK)
    )
    with pytest.raises(ValueError, match=r"192 features, but \w+ is expecting 768"):
        output_of(flat, STACK[:, :8, :8].reshape(12, -1))


@each_estimator
def test_ragged_lists_of_numbers_raise(estimator):
    with pytest.raises(ValueError, match="inhomogeneous"):
        clone(estimator).fit([[1, 2, 3, 4]] * 11 + [[1, 2, 3]], Y)


@each_estimator
@pytest.mark.parametrize("n", [1, 2])
def test_very_few_images(estimator, n):
    fitted = clone(estimator).fit(STACK, Y)
    few = output_of(fitted, STACK[:n])
    largest = np.abs(few).max()
    np.testing.assert_allclose(few, output_of(fitted, STACK)[:n], atol=1e-5 * largest)
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        output_of(fitted, STACK[:0])


@pytest.mark.parametrize(
    "estimator",
    [FineTunedCNNClassifier("tiny", max_epochs=2, random_state=0, engine="torch")],
)
@pytest.mark.parametrize("counts", [[1, 1], [1, 11], [2, 1, 1]])
def test_one_image_of_a_class(estimator, counts):
    y = np.repeat(list("abc")[: len(counts)], counts)
    with pytest.warns(UserWarning, match="class with one image"):
        fitted = clone(estimator).fit(STACK[: len(y)], y)
    assert fitted.classes_.tolist() == sorted(set(y))
    assert np.isfinite(fitted.predict_proba(STACK)).all()


# Labels and weights


BAD_LABELS = {
    "NaN": (np.where(Y, np.nan, 1.0), r"y\[\d+\] is missing \(nan\)"),
    "infinity": (np.where(Y, np.inf, 1.0), "contains infinity"),
    "continuous": (Y + 0.5, "Unknown label type"),
    "columns of classes": (np.stack([Y, 2 * Y], 1), "1d array|MultiOutputClassifier"),
    "too few": (Y[:-1], "inconsistent numbers of samples"),
    "complex": (Y + 1j, "Complex data"),
    "missing": (
        np.where(Y, "a", None),
        r"y\[\d+\] is missing \(None\)",
    ),
}


@each_classifier
@pytest.mark.parametrize("name", BAD_LABELS)
def test_invalid_labels_raise(estimator, name):
    y, reason = BAD_LABELS[name]
    with pytest.raises((ValueError, TypeError), match=reason) as ours:
        clone(estimator).fit(STACK, y)
    with pytest.raises((ValueError, TypeError)) as theirs:
        LogisticRegression().fit(STACK.reshape(12, -1), y)
    assert ours.type is theirs.type


@each_classifier
def test_failed_fit_leaves_the_fitted_model(estimator):
    fitted = clone(estimator).fit(STACK, np.where(Y, "b", "a"))
    expected = fitted.predict_proba(STACK)
    for X, y in (
        (STACK, np.where(Y, np.nan, 1.0)),
        (STACK, Y[:-1]),
        (["nowhere.png"] * 12, Y),
        (np.zeros((12, 8, 8, 2)), Y),
    ):
        with pytest.raises(ValueError, match=r"X|y|sample"):
            fitted.fit(X, y)
        assert fitted.classes_.tolist() == ["a", "b"]
        np.testing.assert_array_equal(fitted.predict_proba(STACK), expected)


@each_classifier
def test_failed_fit_leaves_the_number_of_features(estimator):
    flat, other = STACK[..., 0].reshape(12, -1), STACK[:, :8, :8, 0].reshape(12, -1)
    fitted = clone(estimator).fit(flat, Y)
    expected = fitted.predict_proba(flat)
    for X in (other, STACK):
        with pytest.raises(ValueError, match="Unknown label type"):
            fitted.fit(X, Y + 0.5)
        assert fitted.n_features_in_ == flat.shape[1]
        np.testing.assert_array_equal(fitted.predict_proba(flat), expected)
    assert fitted.fit(other, Y).n_features_in_ == other.shape[1]
    assert not hasattr(fitted.fit(STACK, Y), "n_features_in_")


@pytest.mark.parametrize("class_weight", [{"a": 2}, {}])
def test_class_weight_of_some_classes(class_weight):
    options = {"max_epochs": 0, "random_state": 0, "engine": "torch"}
    mine = FineTunedCNNClassifier("tiny", **options)
    mine.set_params(class_weight=class_weight).fit(STACK, np.where(Y, "b", "a"))
    full = clone(mine).set_params(class_weight={"a": 1, "b": 1, **class_weight})
    np.testing.assert_array_equal(
        full.fit(STACK, np.where(Y, "b", "a")).predict_proba(STACK),
        mine.predict_proba(STACK),
    )


@pytest.mark.parametrize("class_weight", [{"a": 2, "z": 3}, {"z": 3}])
def test_class_weight_of_unknown_classes_raises(class_weight):
    mine = FineTunedCNNClassifier("tiny", max_epochs=0, class_weight=class_weight)
    theirs = LogisticRegression(class_weight=class_weight)
    messages = []
    for each, X in ((mine, STACK), (theirs, STACK.reshape(12, -1))):
        with pytest.raises(ValueError, match="not in class_weight") as error:
            each.fit(X, np.where(Y, "b", "a"))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_class_of_zero_sample_weight_is_dropped():
    y = np.repeat(list("abc"), 4)
    weight = np.where(y == "b", 0.0, 1.0)
    mine, without = (clone(ESTIMATORS[0]) for _ in range(2))
    mine.fit(STACK, y, sample_weight=weight)
    without.fit(STACK[weight > 0], y[weight > 0])
    assert mine.classes_.tolist() == ["a", "c"]
    np.testing.assert_array_equal(
        mine.predict_proba(STACK), without.predict_proba(STACK)
    )
    with pytest.raises(ValueError, match=r"Got one class: \['c'\]"):
        mine.fit(STACK, y, sample_weight=y == "c")


def test_zero_sample_weight_in_a_pretrained_classifier():
    weight = np.where(np.arange(12) < 6, 1.0, 0.0)
    mine = PretrainedClassifier("resnet_mini", engine="torch")
    some = clone(mine).fit(STACK[:6], Y[:6])
    mine.fit(STACK, Y, sample_weight=weight)
    np.testing.assert_allclose(mine.predict_proba(STACK), some.predict_proba(STACK))


# Duplicate images, and groups


def test_duplicate_images_are_cached_once(tmp_path):
    mine = PretrainedFeatures("tiny", memory=tmp_path, engine="torch")
    X = resample(STACK, n_samples=200, random_state=0)
    rows = mine.transform(X)
    distinct, which = np.unique(X.reshape(200, -1), axis=0, return_inverse=True)
    which = which.ravel()  # NumPy 2.0.0 gives a column
    first = np.array([np.flatnonzero(which == i)[0] for i in range(len(distinct))])
    np.testing.assert_array_equal(rows, rows[first[which]])
    assert FeatureStore(tmp_path).info()["rows"] == len(distinct)


@pytest.mark.parametrize("routing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_groups_are_passed_to_the_splitter(paths, routing):
    groups = np.repeat(np.arange(8), 5)
    y = np.arange(40) % 2
    model = make_pipeline(
        PretrainedFeatures("tiny", engine="torch"), LogisticRegression()
    )
    for estimator, grid in (
        (model, {"logisticregression__C": [0.1, 1]}),
        (ESTIMATORS[0], {"max_epochs": [0, 1]}),
    ):
        with sklearn.config_context(enable_metadata_routing=routing):
            search = GridSearchCV(estimator, grid, cv=GroupKFold(2))
            search.fit(paths, y, groups=groups)
            assert search.n_splits_ == 2
            with pytest.raises(ValueError, match="groups"):
                search.fit(paths, y)
    alone = cross_val_predict(model, paths, y, groups=groups, cv=GroupKFold(4))
    assert alone.shape == (40,)


# Forked processes


FORKED = """
import os, sys
from store_rows import KEYS, SPACE, check_rows, make_rows
from sktl import FeatureStore
mine = FeatureStore(sys.argv[1])
mine.put(SPACE, KEYS[:20], make_rows(KEYS[:20]))
check_rows(mine, n_expected=20)
children = []
for i in range(4):
    child = os.fork()
    if not child:
        keys = KEYS[20 + 5 * i : 25 + 5 * i]
        mine.put(SPACE, keys, make_rows(keys))
        positions, _ = mine.get(SPACE, KEYS[:20] + keys)
        os._exit(len(positions) != 25)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
check_rows(mine)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_share_the_store(tmp_path):
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{FORKED}"
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


# Output


@each_estimator
def test_estimators_print_nothing_without_verbose(estimator, paths, tmp_path, capfd):
    mine = clone(estimator).set_params(memory=tmp_path / "store", verbose=0)
    for _ in range(2):
        output_of(mine.fit(paths, np.arange(40) % 2), paths)
    assert capfd.readouterr() == ("", "")
