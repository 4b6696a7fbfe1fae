"""Tests of the validation of indicator matrices."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from sktl._utils.indicators import check_indicator_matrix, has_several_columns

MATRIX = [[0, 1, 1], [1, 0, 1]]


@pytest.mark.parametrize(
    "y",
    [
        MATRIX,
        [tuple(row) for row in MATRIX],
        np.array(MATRIX, float),
        np.array(MATRIX, bool),
        np.array(MATRIX, object),
        pd.DataFrame(MATRIX, index=[5, 3]),
        pd.DataFrame(MATRIX, dtype="Int64"),
        pl.DataFrame(MATRIX, orient="row"),
        scipy.sparse.csr_matrix(MATRIX),
        scipy.sparse.coo_array(MATRIX),
    ],
)
def test_every_kind_of_matrix(y):
    assert has_several_columns(y)
    got = check_indicator_matrix(y, LogisticRegression())
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, MATRIX)


@pytest.mark.parametrize(
    "y",
    [
        None,
        "ab",
        ["a", "b"],
        [0, 1],
        [[0], [1]],
        np.zeros((2, 1)),
        pd.Series([1]),
        scipy.sparse.csr_array([[0], [1]]),
    ],
)
def test_one_label_per_image(y):
    assert not has_several_columns(y)


@pytest.mark.parametrize("y", [[{"a"}, {"a", "b"}], [["a"], ["a", "b"]], [(), (1, 2)]])
def test_collections_of_labels_name_the_binarizer(y):
    with pytest.raises(ValueError, match=r"Convert it by .*MultiLabelBinarizer"):
        has_several_columns(y)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (np.nan, r"y\[1, 2\] is missing \(nan\)"),
        (None, r"y\[1, 2\] is missing"),
        (-1, r"Got y\[1, 2\] = -1.*MultiOutputClassifier"),
        (2, r"Got y\[1, 2\] = 2.*MultiOutputClassifier"),
        ("dog", r"Got y\[1, 2\] = 'dog'.*MultiOutputClassifier"),
        (0.3, r"continuous-multioutput.* Got y\[1, 2\] = 0.3.* FineTunedCNNRegressor"),
        (np.inf, r"^LogisticRegression requires .*Got y\[1, 2\] = inf"),
    ],
)
def test_other_elements_are_named(element, reason):
    y = np.array(MATRIX, object if element in (None, "dog") else float)
    y[1, 2] = element
    for each in (y, y.tolist(), pd.DataFrame(y)):
        with pytest.raises(ValueError, match=reason):
            check_indicator_matrix(each, LogisticRegression())
