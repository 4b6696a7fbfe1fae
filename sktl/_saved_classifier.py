"""A fitted classifier in one file of which nothing is executed when it is read."""

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from sktl._backbones import Reference, load_backbone
from sktl._preprocessing import Preprocessing
from sktl._random_state import borrowed_generator
from sktl._tensor_file import SENSELESS, read_tensors, write_tensors
from sktl._trainable import network_digest, new_network
from sktl._weights import Unfilled, fill

Estimator = TypeVar("Estimator")
_FORMAT = "sktl FineTunedCNNClassifier, version 1"
_FITTED = [
    "n_iter_",
    "best_epoch_",
    "loss_curve_",
    "validation_scores_",
    "history_",
    "n_features_in_",
    "feature_names_in_",
]


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted classifier to a file.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Fitted.
    path : str or path-like
        Name of the file.

    Raises
    ------
    OSError
        If it cannot be written.
    TypeError
        If the labels are neither str, int, float nor bool.
    """
    parameters, left_out = {}, []
    for name, value in estimator.get_params(deep=False).items():
        try:
            parameters[name] = _plain(value)
        except TypeError:
            left_out.append(name)
    if left_out:
        warnings.warn(
            f"Only parameters of plain values are saved; {', '.join(left_out)} will "
            "have the default again.",
            UserWarning,
            stacklevel=3,
        )
    document = {
        "format": _FORMAT,
        "parameters": parameters,
        "network": estimator._built_as,
        "preprocessing": asdict(estimator.preprocessing_),
        "classes": _plain(estimator.classes_.tolist()),
        "dtype_of_classes": estimator.classes_.dtype.str,
        "fitted": {
            name: _plain(getattr(estimator, name))
            for name in _FITTED
            if hasattr(estimator, name)
        },
    }
    write_tensors(Path(path).expanduser(), estimator.module_.state_dict(), document)


def load(kind: Callable[..., Estimator], path: str | os.PathLike[str]) -> Estimator:
    """Read what `save` wrote.

    Parameters
    ----------
    kind : class
        FineTunedCNNClassifier, which this room does not know.
    path : str or path-like
        Name of the file.

    Returns
    -------
    FineTunedCNNClassifier
        Fitted.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is anything else, is damaged, or its backbone is not known.
    """
    tensors, document = read_tensors(Path(path).expanduser())
    if document.get("format") != _FORMAT:
        raise ValueError(
            f"{str(path)!r} must be a file of FineTunedCNNClassifier.save. Got a file "
            f"of the format {document.get('format')!r}."
        )
    try:
        parameters = document["parameters"].items()
        estimator = kind(**{name: _usual(value) for name, value in parameters})
        for name, value in _fitted(document, tensors).items():
            setattr(estimator, name, value)
        return estimator
    except SENSELESS as error:
        raise ValueError(
            f"{str(path)!r} must be a file of FineTunedCNNClassifier.save, and its "
            "backbone the network that it was. Got "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _fitted(document: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    given = document["fitted"]
    fitted = {name: _usual(given[name]) for name in _FITTED if name in given}
    for name in ("loss_curve_", "validation_scores_", "history_"):
        if fitted[name] is not None:
            fitted[name] = list(fitted[name])
    if "feature_names_in_" in fitted:
        fitted["feature_names_in_"] = np.array(fitted["feature_names_in_"], object)
    classes = np.array(document["classes"], np.dtype(document["dtype_of_classes"]))
    network = _rebuilt(document["network"], len(classes), tensors)
    return fitted | {
        "classes_": classes,
        "module_": network,
        "preprocessing_": Preprocessing(**document["preprocessing"]),
        "_built_as": document["network"],
        "_digest": network_digest(network),
        # Which weights the lower part has is not known: so nothing remembered is used.
        "_n_frozen": 0,
        "_pretrained": (0, Reference(document["network"]["backbone"], None, 0, "")),
    }


def _rebuilt(
    built_as: dict[str, Any], n_classes: int, tensors: dict[str, Tensor]
) -> nn.Sequential:
    backbone = load_backbone(built_as["backbone"], None)
    # Without memory for the head: how wide it says it is need not be true.
    with borrowed_generator(), Unfilled():
        network = new_network(
            backbone,
            n_classes,
            hidden_layer_sizes=built_as["hidden_layer_sizes"],
            dropout=built_as["dropout"],
        )
    fill(network, tensors, "Those of the file")
    return network.eval()


def _plain(value: Any) -> Any:
    """Turn a value into what JSON can hold, and `_usual` can turn back."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {"pairs": [[_plain(k), _plain(v)] for k, v in value.items()]}
    raise TypeError(f"Got a {type(value).__name__}, which JSON cannot hold.")


def _usual(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _usual(each) for key, each in value["pairs"]}
    return tuple(map(_usual, value)) if isinstance(value, list) else value
