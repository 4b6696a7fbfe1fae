"""Class labels are validated, and missing ones are named."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression

from sktl._utils.labels import check_labels


@pytest.mark.parametrize(
    ("y", "value"),
    [
        (["a", "b", None], "None"),
        (["a", "b", float("nan")], "nan"),  # as an array: the label "nan"
        (["a", "b", np.float32("nan")], r"np\.float32\(nan\)"),
        (["a", "b", pd.NA], "<NA>"),
        ([1, 2, None], "None"),
        ([True, False, float("nan")], "nan"),
        (np.array([1.0, 2.0, np.nan]), "nan"),
        (np.array(["a", "b", None], dtype=object), "None"),
        (np.array([["a"], ["b"], [None]], dtype=object), "None"),
        (pd.Series(["a", "b", np.nan], index=[7, 8, 9]), "nan"),
        (pd.Series(["a", "b", pd.NA], dtype="string"), "(<NA>|nan)"),
        (pd.Series([1, 2, pd.NA], dtype="Int64"), "(<NA>|nan)"),
        (pd.Series([True, False, pd.NA], dtype="boolean"), "(<NA>|nan)"),
        (pd.Series(["a", "b", None], dtype="category"), "nan"),
        (pd.DataFrame({"label": ["a", "b", pd.NA]}), "(<NA>|nan)"),
        (pl.Series("label", ["a", "b", None]), "None"),
        (pl.Series("label", [1, 2, None]), "nan"),
    ],
)
def test_missing_label_is_named(y, value):
    message = rf"y\[2\] is missing \({value}\)\. Each image must have a label\. Remove"
    with pytest.raises(ValueError, match=message):
        check_labels(y, LogisticRegression())


@pytest.mark.parametrize(
    "y",
    [
        ["a", "nan", ""],
        [True, False, True],
        (1, 2, 3),
        np.array(["a", "b", "None"]),
        pd.Series(["a", "b", "c"], dtype="category"),
        pd.Series([1, 2, 3], dtype="Int64"),
        pl.Series("label", ["a", "b", "c"]),
    ],
)
def test_complete_labels_are_returned(y):
    labels = check_labels(y, LogisticRegression())
    assert labels.tolist() == list(y)


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        ([1.0, np.inf], "Input y contains infinity"),
        ([0.1, 0.7, 3.4], "Unknown label type: continuous"),
        ([[0, 1], [1, 0]], "1d array"),
        ([[0, None], [1, 0]], "1d array"),
        ("ab", "1d array"),
        (1, "1d array"),
    ],
)
def test_other_invalid_labels_raise_the_error_of_scikit_learn(y, reason):
    with pytest.raises(ValueError, match=reason):
        check_labels(y, LogisticRegression())
