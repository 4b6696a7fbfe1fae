"""Parameter values as JSON, and validation of JSON values from files."""

import os
from collections.abc import Mapping
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


def get_value(
    document: Mapping[str, Any], name: str, kind: type | tuple[type, ...]
) -> Any:
    """Return a value of a JSON object from a file.

    Parameters
    ----------
    document : mapping of str
        The object.
    name : str
        Key of the value.
    kind : type or tuple of type
        Its type. A bool is not an int.

    Raises
    ------
    ValueError
        If it is missing or has another type.
    """
    value = document.get(name)
    # A bool is an int to isinstance, but not to JSON.
    valid = isinstance(value, kind) and not isinstance(value, bool)
    require(valid, f"its {name!r} is missing or has an invalid type")
    return value


def is_list_of(values: Any, *kinds: type) -> bool:
    """Return whether a JSON value is a list of values of these types exactly."""
    return isinstance(values, list) and all(type(value) in kinds for value in values)


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with a message about a file if a condition is false."""
    if not condition:
        raise ValueError(message)
