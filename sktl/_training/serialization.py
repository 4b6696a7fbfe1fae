"""A fitted classifier in one file of which nothing is executed when it is read."""

import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.weights import load_weights_into, skip_weight_allocation
from sktl._images.preprocessing import Preprocessing
from sktl._training.network import network_digest, replace_head
from sktl._utils.random_state import preserve_rng_state
from sktl._utils.tensor_file import PARSE_ERRORS, read_tensors, write_tensors

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
            parameters[name] = to_json(value)
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
        "network": estimator._model_config,
        "preprocessing": asdict(estimator.preprocessing_),
        "classes": to_json(estimator.classes_.tolist()),
        "dtype_of_classes": estimator.classes_.dtype.str,
        "fitted": {
            name: to_json(getattr(estimator, name))
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
        estimator = kind(**{name: from_json(value) for name, value in parameters})
        for name, value in _fitted(document, tensors).items():
            setattr(estimator, name, value)
        return estimator
    except PARSE_ERRORS as error:
        raise ValueError(
            f"{str(path)!r} must be a file of FineTunedCNNClassifier.save, and its "
            "backbone the network that it was. Got "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _fitted(document: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    given = document["fitted"]
    fitted = {name: from_json(given[name]) for name in _FITTED if name in given}
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
        "_model_config": document["network"],
        "_digest": network_digest(network),
        # Which weights the lower part has is not known: so nothing remembered is used.
        "_n_frozen": 0,
        "_pretrained": (0, BackboneSpec(document["network"]["backbone"], None, 0, "")),
    }


def _rebuilt(
    model_config: dict[str, Any], n_classes: int, tensors: dict[str, Tensor]
) -> nn.Sequential:
    backbone = load_backbone(model_config["backbone"], None)
    # Without memory for the head: how wide it says it is need not be true.
    with preserve_rng_state(), skip_weight_allocation():
        network = replace_head(
            backbone,
            n_classes,
            hidden_layer_sizes=model_config["hidden_layer_sizes"],
            dropout=model_config["dropout"],
        )
    load_weights_into(network, tensors, "Those of the file")
    return network.eval()


def to_json(value: Any) -> Any:
    """Turn a value into what JSON can hold, and `from_json` can turn back."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(each) for each in value]
    if isinstance(value, dict):
        return {"pairs": [[to_json(k), to_json(v)] for k, v in value.items()]}
    raise TypeError(f"Got a {type(value).__name__}, which JSON cannot hold.")


def from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: from_json(each) for key, each in value["pairs"]}
    return tuple(map(from_json, value)) if isinstance(value, list) else value
