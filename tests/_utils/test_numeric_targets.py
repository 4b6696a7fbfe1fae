"""Tests of the validation of the targets of a regressor."""

import datetime

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from sklearn.linear_model import Ridge

from sktl._utils.numeric_targets import check_numbers

COLUMN = [3, 1, 2]


@pytest.mark.parametrize(
    "y",
    [
        COLUMN,
        tuple(COLUMN),
        np.array(COLUMN, "f4"),
        np.array(COLUMN, "u1"),
        np.array(COLUMN, object),
        pd.Series(COLUMN, index=[7, 8, 9]),
        pd.Series(COLUMN, dtype="Int64"),
        pl.Series(COLUMN),
    ],
)
def test_every_kind_of_numbers_becomes_float64(y):
    got = check_numbers(y, Ridge())
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, [3.0, 1.0, 2.0])


@pytest.mark.parametrize("y", [[[3], [1]], [[3, 1], [2, 5]], pd.DataFrame([[1, 2.5]])])
def test_columns_are_kept(y):
    np.testing.assert_array_equal(check_numbers(y, Ridge()), np.asarray(y, float))


@pytest.mark.parametrize(
    ("y", "element"),
    [
        ([1, 2, np.nan], r"y\[2\] = nan"),
        ([1, None, 2], r"y\[1\] = None"),
        ([1, np.inf, 2], r"y\[1\] = inf"),
        (np.array([1, 2, -np.inf], "f4"), r"y\[2\] = -inf"),
        ([[1, 2], [3, np.nan]], r"y\[1, 1\] = nan"),
        (pd.Series([1, pd.NA], dtype="Int64"), r"y\[1\] = (<NA>|nan)"),
        (pl.Series([1, None]), r"y\[1\] = .*nan"),
        (pd.DataFrame({"a": [1, 2], "b": [3, None]}), r"y\[1, 1\] = .*nan"),
    ],
)
def test_missing_and_infinite_numbers_are_named(y, element):
    with pytest.raises(ValueError, match=rf"must be finite numbers\. Got {element}"):
        check_numbers(y, Ridge())


@pytest.mark.parametrize(
    ("y", "element"),
    [
        (["a", "b"], r"y\[0\] = 'a'"),
        (["1", "2"], r"y\[0\] = '1'"),
        ([1.5, "b"], r"y\[1\] = 'b'"),
        (np.array([["a"]]), r"y\[0, 0\] = "),
        ([datetime.date(2020, 1, 1)], r"y\[0\] = datetime"),
        (np.array(["2020-01-01"], "M8[D]"), r"y\[0\] = .*datetime"),
        (np.array(["2020-01-01"], "M8[ns]"), r"y\[0\] = datetime"),
        (np.array([3, 4], "m8[ns]"), r"y\[0\] = datetime.timedelta"),
        ("abc", "y = 'abc'"),
        (pd.Series(["x", "y"], dtype="category"), r"y\[0\] = 'x'"),
    ],
)
def test_labels_name_the_classifier(y, element):
    with pytest.raises(ValueError, match=rf"Got {element}.* FineTunedCNNClassifier"):
        check_numbers(y, Ridge())


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        (scipy.sparse.csr_array([[1.0, 2.0]]), "dense y"),
        ([[1], [2, 3]], "numbers as y|inhomogeneous|sequence"),
        (5.0, "0-dim|scalar|1d|Singleton|array"),
        (np.zeros((2, 2, 2)), "dim"),
        (np.array([1 + 1j, 2]), "Complex data not supported"),
    ],
)
def test_other_shapes(y, reason):
    with pytest.raises((ValueError, TypeError), match=reason):
        check_numbers(y, Ridge())
