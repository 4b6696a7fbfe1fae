"""Parameter values as JSON."""

import os
from typing import Any

import numpy as np


def to_json(value: Any) -> Any:
    """Convert a value to what JSON can hold and `from_json` can convert back.

    Parameters
    ----------
    value : None, bool, int, float, str, path-like, NumPy scalar or array, list, tuple \
or dict
        Lists and arrays become tuples again, paths become str.

    Returns
    -------
    object
        None, bool, int, float, str, list or dict.

    Raises
    ------
    TypeError
        If JSON cannot hold the value.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(each) for each in value]
    if isinstance(value, dict):
        # JSON has no keys but str, and a class_weight has labels of any type as keys.
        return {"pairs": [[to_json(k), to_json(v)] for k, v in value.items()]}
    raise TypeError(f"JSON cannot hold a {type(value).__name__}.")


def from_json(value: Any) -> Any:
    """Convert a value back that `to_json` has converted.

    Parameters
    ----------
    value : None, bool, int, float, str, list or dict
        From a file; anything that JSON can hold may be in it.

    Returns
    -------
    object
        The value, with tuples for lists.

    Raises
    ------
    ValueError
        If a dict is not one that `to_json` makes.
    """
    if isinstance(value, list):
        return tuple(from_json(each) for each in value)
    if not isinstance(value, dict):
        return value
    pairs = value.get("pairs")
    if value.keys() != {"pairs"} or not isinstance(pairs, list):
        raise ValueError("a dict must be a list of pairs")
    result = {}
    for pair in pairs:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or isinstance(pair[0], list | dict)
        ):
            raise ValueError("a dict must be a list of pairs of a key and a value")
        result[pair[0]] = from_json(pair[1])
    return result
