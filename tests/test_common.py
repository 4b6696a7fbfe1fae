"""Common tests of all estimators: scikit-learn's checks, and tests with images.

scikit-learn's checks use rows of numbers. Those that apply to other kinds of input are
repeated here with images: equal output with each kind, the rest with two of them.
"""

import pickle
from pathlib import Path
from unittest import SkipTest

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from PIL import Image
from shared_fixtures import FIXED
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks, get_tags
from sklearn.utils.fixes import parse_version

import sktl
from sktl import (
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    PretrainedClassifier,
    PretrainedFeatures,
)
from sktl._backbones import registry
from sktl._inference import engines
from sktl._utils.keyed_cache import KeyedCache

pytestmark = pytest.mark.usefixtures("quick_linear_probe")

# A converted network of OpenVINO would take longer than each fit.
OPTIONS = {"max_epochs": 1, "random_state": 0, "engine": "torch"}
ESTIMATORS = [
    FineTunedCNNClassifier("tiny", **FIXED, **OPTIONS),
    FineTunedCNNRegressor("tiny", **FIXED, **OPTIONS),
    PretrainedClassifier("projection"),
    PretrainedFeatures("tiny"),
]
TRANSFORMERS = ESTIMATORS[3:]
# They train several times in each fit.
SELECTING = [
    FineTunedCNNClassifier("tiny", **OPTIONS),
    FineTunedCNNRegressor("tiny", **OPTIONS),
]

# Checks that fail by design, with the reason.
EXPECTED_FAILURES = {
    (estimator, "check_sample_weight_equivalence_on_dense_data"): (
        "an image of weight 2 is in one batch, two copies of it are in two"
    )
    for estimator in (FineTunedCNNClassifier, FineTunedCNNRegressor)
}

LONG_CHECKS = {
    "check_classifier_data_not_an_array",
    "check_classifiers_classes",
    "check_classifiers_multilabel_representation_invariance",
    "check_classifiers_train",
    "check_regressor_data_not_an_array",
}

# Checks that scikit-learn runs on its own estimators, but not in check_estimator.
ADDITIONAL_CHECKS = [
    "check_dataframe_column_names_consistency",
    "check_get_feature_names_out_error",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_inplace_ensure_writeable",
    "check_param_validation",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
]

# The checks use rows of 2 or 5 numbers, most of them outside the range of floats.
# The warnings about that are correct, and not what is checked there.
IGNORED_WARNINGS = [
    "ignore:X has .* neither a square grey nor a square RGB image:UserWarning",
    "ignore:X has .* used as an RGB image of .* the channels last:UserWarning",
    "ignore:.* values outside pixel_range=.* are clipped:UserWarning",
    "ignore:.* maps the full range of the dtype:UserWarning",
    # Some checks fit on a frame and transform an array, or the reverse.
    "ignore:X (has|does not have valid) feature names:UserWarning",
]
ignore_warnings = [pytest.mark.filterwarnings(entry) for entry in IGNORED_WARNINGS]


def checks_of(estimator):
    pairs = list(estimator_checks.estimator_checks_generator(estimator))
    if estimator is ESTIMATORS[1]:
        # With the settings of `SELECTING` it runs all of them. What is not about
        # numbers is the same code as in the classifier.
        pairs = [pair for pair in pairs if "regressor" in name_of(pair[1])]
    return pairs


def marked(estimator, check):
    """Return a parameter of both, marked if the check is slow or expected to fail."""
    reason = EXPECTED_FAILURES.get((type(estimator), name_of(check)))
    marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
    # Models with fixed settings run the longest checks with selected settings only.
    is_long = estimator in ESTIMATORS[:2] and name_of(check) in LONG_CHECKS
    if is_long or any(estimator is each for each in SELECTING):
        marks.append(pytest.mark.slow)
    return pytest.param(estimator, check, marks=marks)


def name_of(check):
    return getattr(check, "func", check).__name__


class TestScikitLearn:
    pytestmark = ignore_warnings

    @pytest.mark.parametrize(
        ("estimator", "check"),
        [
            marked(*pair)
            for estimator in (*ESTIMATORS, *SELECTING)
            for pair in checks_of(estimator)
        ],
        ids=lambda value: name_of(value) if callable(value) else "",
    )
    def test_check_estimator(self, estimator, check):
        try:
            check(estimator)
        except SkipTest as reason:
            pytest.fail(f"no check may be skipped: {reason}")

    @pytest.mark.parametrize(
        ("estimator", "name"),
        [
            *(
                (estimator, name)
                for estimator in TRANSFORMERS
                for name in ADDITIONAL_CHECKS
            ),
            *(
                (estimator, name)
                for estimator in ESTIMATORS[:3]
                for name in (
                    "check_dataframe_column_names_consistency",
                    "check_param_validation",
                )
            ),
        ],
    )
    def test_additional_checks(self, estimator, name):
        getattr(estimator_checks, name)(type(estimator).__name__, estimator)

    # An estimator tagged two_d_array=False would get one check instead of these. A
    # transformer that needs fit gets one more, check_estimators_unfitted, which demands
    # the opposite of what a stateless one promises.
    @pytest.mark.parametrize(
        ("estimator", "n"),
        [*zip([*SELECTING, *ESTIMATORS[2:]], [63, 57, 60, 46], strict=True)],
    )
    def test_no_check_is_lost(self, estimator, n):
        newest = parse_version(sklearn.__version__) >= parse_version("1.9")
        assert len(checks_of(estimator)) >= (n if newest else n - 3)

    def test_every_public_estimator_is_here(self):
        public = {getattr(sktl, name) for name in sktl.__all__}
        estimators = {each for each in public if hasattr(each, "get_params")}
        assert {type(each) for each in ESTIMATORS} == estimators


KINDS = {
    "list of paths": list,
    "array of paths": np.asarray,
    "object array of paths": lambda paths: np.asarray(paths, dtype=object),
    "column of paths": lambda paths: np.asarray(paths, dtype=object)[:, None],
    "pandas Series": lambda paths: pd.Series(paths, index=range(100, 100 + len(paths))),
    "pandas frame": lambda paths: pd.DataFrame(
        {"path": paths}, index=range(100, 100 + len(paths))
    ),
    "polars Series": pl.Series,
    "polars frame": lambda paths: pl.DataFrame({"path": paths}),
    "PIL images": lambda paths: [Image.open(path).copy() for path in paths],
    "bytes": lambda paths: [Path(path).read_bytes() for path in paths],
    "list of arrays": lambda paths: [np.asarray(Image.open(p)) for p in paths],
    "4-D array": lambda paths: np.stack([np.asarray(Image.open(p)) for p in paths]),
    "4-D floats": lambda paths: (
        np.stack([np.asarray(Image.open(p)) for p in paths]) / 255
    ),
    "tensor": lambda paths: torch.from_numpy(
        np.stack([np.asarray(Image.open(p)) for p in paths])
    ),
}


def take(X, rows):
    """Return rows of X of any kind, indexed as cross-validation does."""
    if isinstance(X, list):
        return [X[row] for row in rows]
    return X.iloc[list(rows)] if hasattr(X, "iloc") else X[list(rows)]


def fitted(estimator, X):
    """Fit a clone on X, with two classes if the estimator requires y."""
    required = get_tags(estimator).target_tags.required
    return clone(estimator).fit(X, np.arange(len(X)) % 2 if required else None)


def output_of(estimator, X):
    """Return the features or the predictions of images, one row each."""
    methods = ("transform", "predict_proba", "predict")
    output = getattr(estimator, next(m for m in methods if hasattr(estimator, m)))(X)
    return output.reshape(len(output), -1)


@pytest.fixture(scope="module")
def outputs_of_array():
    """Return a dict in which a test keeps the output of an estimator for the next."""
    return {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_kind_of_input_gives_the_same_output(
    estimator, kind, paths, images, outputs_of_array
):
    X = KINDS[kind](paths)
    if estimator not in outputs_of_array:
        outputs_of_array[estimator] = output_of(fitted(estimator, images), images)
    expected = outputs_of_array[estimator]
    np.testing.assert_array_equal(output_of(fitted(estimator, X), X), expected)


# Files and pixels; a frame has an index, too.
each_of_two_kinds = pytest.mark.parametrize("kind", ["pandas frame", "4-D array"])


@each_of_two_kinds
@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestImages:
    @pytest.fixture
    def X(self, kind, paths):
        return KINDS[kind](paths)

    def test_fit_returns_self_and_does_not_change_its_input(self, estimator, X):
        mine, params, before = clone(estimator), estimator.get_params(), pickle.dumps(X)
        assert mine.fit(X, np.arange(len(X)) % 2) is mine
        state = {name: pickle.dumps(value) for name, value in vars(mine).items()}
        output_of(mine, X)
        assert {n: pickle.dumps(value) for n, value in vars(mine).items()} == state
        assert mine.get_params() == params
        assert pickle.dumps(X) == before

    def test_order_of_rows_does_not_matter(self, estimator, X):
        order = np.random.default_rng(0).permutation(40)
        mine = fitted(estimator, X)
        rows = output_of(mine, X)
        np.testing.assert_array_equal(output_of(mine, take(X, order)), rows[order])

    def test_a_row_does_not_depend_on_the_other_rows(self, estimator, X):
        mine = fitted(estimator, X)
        together = output_of(mine, X)
        alone = np.vstack([output_of(mine, take(X, [row])) for row in (0, 7, 39)])
        np.testing.assert_allclose(
            alone, together[[0, 7, 39]], atol=1e-5 * np.abs(together).max(), rtol=0
        )

    def test_pickle_and_joblib(self, estimator, X, tmp_path):
        mine = fitted(estimator, X)
        joblib.dump(mine, tmp_path / "mine.joblib")
        for copied in (
            pickle.loads(pickle.dumps(mine)),
            joblib.load(tmp_path / "mine.joblib"),
        ):
            np.testing.assert_array_equal(output_of(copied, X), output_of(mine, X))

    def test_no_rows_raise(self, estimator, X):
        with pytest.raises(ValueError, match=r"0 sample\(s\)|minimum of 1"):
            clone(estimator).fit(take(X, []), [])


@each_of_two_kinds
@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_several_columns_of_targets(estimator, kind, paths, images):
    Y = np.column_stack([np.arange(40) % 2, np.arange(40) < 20]).astype(int)
    X = KINDS[kind](paths)
    mine = clone(estimator).fit(X, Y)
    output = output_of(mine, X)
    assert output.shape == Y.shape
    assert mine.predict(X).shape == Y.shape
    expected = output_of(clone(estimator).fit(images, Y), images)
    np.testing.assert_array_equal(output, expected)
    reverse = output_of(mine, take(X, range(39, -1, -1)))
    np.testing.assert_array_equal(reverse[::-1], output)
    copied = pickle.loads(pickle.dumps(mine))
    np.testing.assert_array_equal(output_of(copied, X), output)


FINE_TUNED = {**FIXED, **OPTIONS, "batch_size": 8}


@pytest.mark.parametrize(
    "estimator",
    [
        PretrainedFeatures(
            "resnet_mini", layer=["stage2", "penultimate"], image_size=32
        ),
        PretrainedFeatures("squeezenet1_1", weights=None, image_size=32),
        PretrainedClassifier("resnet_mini", image_size=32, engine="torch"),
        SELECTING[0],
        pytest.param(SELECTING[1], marks=pytest.mark.slow),
        pytest.param(
            FineTunedCNNClassifier(
                "tiny", augmentation="standard", **{**FINE_TUNED, "head_init": "random"}
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            FineTunedCNNClassifier(
                "tiny",
                trainable="head",
                hidden_layer_sizes=(4,),
                dropout=0.5,
                augmentation="flip",
                augmentation_views=2,
                **FINE_TUNED,
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_default_data_type_of_torch_does_not_matter(
    estimator, images, tmp_path, monkeypatch
):
    outputs, files = [], [tmp_path / "0", tmp_path / "1"]
    try:
        for dtype, file in zip([torch.float32, torch.float64], files, strict=True):
            monkeypatch.setattr(registry, "backbones", KeyedCache(4))
            monkeypatch.setattr(engines, "compiled_models", KeyedCache(4))
            torch.set_default_dtype(dtype)
            mine = fitted(estimator, images[:20])
            outputs.append(output_of(mine, images[:20]))
            if hasattr(mine, "save"):
                mine.save(file)
                for path in (file, files[0]):
                    loaded = type(mine).load(path)
                    outputs.append(output_of(loaded, images[:20]))
                    dtypes = {p.dtype for p in loaded.module_.parameters()}
                    assert dtypes == {torch.float32}
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for output in outputs:
        assert output.dtype == outputs[0].dtype
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("estimator", [PretrainedClassifier, PretrainedFeatures])
def test_pickles_hold_no_pretrained_weights(estimator, images):
    mine = estimator("resnet_mini").fit(images)
    output_of(mine, images[:2])
    assert len(pickle.dumps(mine)) < 150_000  # the weights have 5.7 MB


@each_of_two_kinds
@pytest.mark.parametrize("estimator", TRANSFORMERS)
class TestTransformersOfImages:
    @pytest.fixture
    def X(self, kind, paths):
        return KINDS[kind](paths)

    def test_works_without_fit_and_again_after(self, estimator, X):
        mine = clone(estimator)
        unfitted = mine.transform(X)
        np.testing.assert_array_equal(mine.fit_transform(X), unfitted)
        np.testing.assert_array_equal(mine.fit(X).transform(X), unfitted)

    def test_in_a_pipeline(self, estimator, X):
        pipeline = make_pipeline(clone(estimator))
        expected = clone(estimator).fit_transform(X)
        np.testing.assert_array_equal(pipeline.fit_transform(X), expected)
        np.testing.assert_array_equal(pipeline.fit(X).transform(X), expected)

    def test_set_output(self, estimator, X):
        mine = clone(estimator).set_output(transform="pandas").fit(X)
        frame = mine.transform(X)
        np.testing.assert_array_equal(frame, clone(estimator).fit_transform(X))
        assert list(frame.columns) == list(mine.get_feature_names_out())
        if hasattr(X, "index") and hasattr(X, "iloc"):
            pd.testing.assert_index_equal(frame.index, X.index)
        mine.set_output(transform="polars")
        assert isinstance(mine.transform(X), pl.DataFrame)
