"""The private names of scikit-learn behave as the estimators rely on."""

import subprocess
import sys
from numbers import Integral, Real

import numpy as np
import pytest
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils._param_validation import InvalidParameterError

from sktl._utils import sklearn_compat
from sktl._utils.sklearn_compat import (
    Interval,
    StrOptions,
    check_feature_names_in,
    check_sample_weight,
    check_y,
    fit_context,
)


class Estimator(BaseEstimator):
    _parameter_constraints: dict = {  # noqa: RUF012  (scikit-learn's convention)
        "alpha": [Interval(Real, 0, 1, closed="left")],
        "kind": [StrOptions({"a", "b"})],
    }

    def __init__(self, alpha=0.5, kind="a"):
        self.alpha = alpha
        self.kind = kind

    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        return self


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"alpha": 1}, r"'alpha' parameter of Estimator must be .*\[0.0, 1.0\)"),
        ({"alpha": "x"}, "'alpha' parameter of Estimator must be"),
        ({"kind": "c"}, "'kind' parameter of Estimator must be a str among"),
    ],
)
def test_fit_context_validates_parameters(params, message):
    with pytest.raises(InvalidParameterError, match=message):
        Estimator(**params).fit([[1]])
    assert issubclass(InvalidParameterError, ValueError)
    assert Estimator(alpha=0, kind="b").fit([[1]]).alpha == 0


def test_interval_is_of_one_type():
    constraint = Interval(Integral, 1, None, closed="left")
    assert constraint.is_satisfied_by(np.int64(1))
    assert not constraint.is_satisfied_by(1.0)
    assert not constraint.is_satisfied_by(0)


def test_check_y_validates_a_column():
    y = check_y(np.array([[1], [2]]).ravel().tolist())
    assert isinstance(y, np.ndarray)
    assert check_y([1, 2], y_numeric=True).tolist() == [1, 2]
    assert check_y([[1, 2]], multi_output=True).shape == (1, 2)
    with pytest.raises(ValueError, match="contains NaN"):
        check_y([1.0, np.nan])
    with pytest.raises(ValueError, match="1d array"):
        check_y([[1, 2], [3, 4]])


def test_check_sample_weight():
    X = np.zeros((3, 2))
    assert check_sample_weight(None, X).tolist() == [1, 1, 1]
    assert check_sample_weight([1, 2, 3], X, dtype=np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="sample_weight"):
        check_sample_weight([1, 2], X)
    with pytest.raises(ValueError, match="Negative"):
        check_sample_weight([1, 2, -3], X, ensure_non_negative=True)


def test_check_feature_names_in():
    estimator = Estimator()
    estimator.n_features_in_ = 2
    assert check_feature_names_in(estimator, None).tolist() == ["x0", "x1"]
    assert check_feature_names_in(estimator, ["a", "b"]).tolist() == ["a", "b"]
    estimator.feature_names_in_ = np.array(["p", "q"], dtype=object)
    with pytest.raises(ValueError, match="input_features is not equal"):
        check_feature_names_in(estimator, ["a", "b"])
    with pytest.raises((ValueError, NotFittedError)):
        check_feature_names_in(Estimator(), None)


WITHOUT_CALLBACKS = """
import pickle
import sklearn.callback

mixin = sklearn.callback.CallbackSupportMixin
del sklearn.callback.CallbackSupportMixin  # as in an older scikit-learn
import sktl._utils.sklearn_compat
sklearn.callback.CallbackSupportMixin = mixin

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sktl import FineTunedCNNClassifier, FineTunedCNNRegressor

X = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
y = np.arange(8) % 2
options = {"trainable": "head", "lr": 0.01, "wise_ft_alpha": 1, "max_epochs": 1}
options |= {"random_state": 0, "engine": "torch"}
for kind in (FineTunedCNNClassifier, FineTunedCNNRegressor):
    estimator = clone(kind("resnet_mini", **options))
    assert not hasattr(estimator, "set_callbacks")
    search = GridSearchCV(estimator, {"lr": [0.01]}, cv=2).fit(X, y)
    estimator.fit(X, y)
    loaded = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(loaded.predict(X), estimator.predict(X))
    assert estimator.partial_fit(X, y).n_iter_ == 2
"""


@pytest.mark.slow
def test_estimators_without_callbacks_of_scikit_learn():
    command = [sys.executable, "-c", WITHOUT_CALLBACKS]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_every_name_is_exported():
    public = {name for name in vars(sklearn_compat) if not name.startswith("_")}
    assert set(sklearn_compat.__all__) == public - {"Any"}  # of typing
