"""Tests of parameter values as JSON."""

import json
from pathlib import Path

import numpy as np
import pytest

from sktl._utils.json_values import from_json, to_json


@pytest.mark.parametrize(
    "value", [None, True, 3, -(2**62), 0.1, float("inf"), "ü", (), (1, ("a", None))]
)
def test_round_trip(value):
    loaded = from_json(json.loads(json.dumps(to_json(value))))
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        ([8, [4]], (8, (4,))),
        (np.array([[1, 2]]), ((1, 2),)),
        (Path("a") / "b", str(Path("a") / "b")),
    ],
)
def test_conversion_to_plain_types(value, expected):
    loaded = from_json(json.loads(json.dumps(to_json(value))))
    assert loaded == expected
    assert type(loaded) is type(expected)


def test_dict_keys_keep_their_type_and_order():
    value = {2: "two", "b": 0.5, np.int64(1): (1, {"c": None}), False: 3}
    loaded = from_json(json.loads(json.dumps(to_json(value))))
    assert list(loaded.items()) == [
        (2, "two"),
        ("b", 0.5),
        (1, (1, {"c": None})),
        (0, 3),
    ]
    assert [type(key) for key in loaded] == [int, str, int, bool]


@pytest.mark.parametrize("value", [object(), {1}, b"a", 1j, [1, b"a"], {"a": len}])
def test_value_that_json_cannot_hold(value):
    with pytest.raises(TypeError, match="JSON cannot hold a"):
        to_json(value)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"a": 1},
        {"pairs": 3},
        {"pairs": [], "more": 1},
        {"pairs": [3]},
        {"pairs": [[1]]},
        {"pairs": [[1, 2, 3]]},
        {"pairs": [[[1], 2]]},
        {"pairs": [[{"pairs": []}, 2]]},
        [{"pairs": None}],
        {"pairs": [["a", {"b": 1}]]},
    ],
)
def test_invalid_document(document):
    with pytest.raises(ValueError, match="a dict must be a list of pairs"):
        from_json(document)
