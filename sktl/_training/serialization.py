"""Saved models: parameters, fitted attributes and weights in one safetensors file.

Nothing in the file is executed when it is loaded. Everything in it is validated, so
that a file that was made by hand raises a ValueError.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sktl._backbones.new_head import replace_head
from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.weights import load_weights_into, skip_weight_allocation
from sktl._images.preprocessing import RESIZE_MODES, Preprocessing
from sktl._training.config import (
    HEAD_INITS,
    MAX_NUMBER,
    TrainingRecord,
    parse_selection,
)
from sktl._training.initial_model import FittedModel, ModelConfig, PretrainedPrefix
from sktl._training.multiclass import multiclass_from_document
from sktl._training.network import network_digest
from sktl._utils.default_dtype import float32_default
from sktl._utils.json_values import from_json, to_json
from sktl._utils.random_state import preserve_rng_state
from sktl._utils.tensor_file import read_tensors, write_tensors

_FORMAT = "sktl fine-tuned model, version 3"
# A new kind of target adds the function that reads its document.
_TARGETS = {"multiclass": multiclass_from_document}
_NUMBER = (int, float)
_MAX_WIDTH = 2**20  # of a hidden layer
_MAX_NORMALIZATION = 1e6  # of mean and std, for pixels in [0, 1]


@dataclass(frozen=True, eq=False)
class SavedModel:
    """Content of a file.

    Attributes
    ----------
    estimator : str
        Name of the class of the estimator.
    parameters : dict of str
        Parameters of the estimator.
    fitted : FittedModel
        The network.
    record : TrainingRecord
        Attributes such as ``history_``.
    n_features_in : int or None
        Attribute ``n_features_in_``, if there is one.
    feature_names_in : ndarray of shape (n_features_in,), object, or None
        Attribute ``feature_names_in_``, if there is one.
    """

    estimator: str
    parameters: dict[str, Any]
    fitted: FittedModel
    record: TrainingRecord
    n_features_in: int | None
    feature_names_in: NDArray[np.object_] | None


def split_parameters(
    parameters: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters that can be saved, and the names of the others."""
    plain, others = {}, []
    for name, value in parameters.items():
        try:
            to_json(value)
        except TypeError:
            others.append(name)
        else:
            plain[name] = value
    return plain, others


def save_model(model: SavedModel, path: str | os.PathLike[str]) -> None:
    """Write a model to a file.

    Parameters
    ----------
    model : SavedModel
        The model.
    path : str or path-like
        Name of the file.

    Raises
    ------
    OSError
        If the file cannot be written.
    TypeError
        If the labels are not str, int, float or bool.
    """
    fitted, names = model.fitted, model.feature_names_in
    document = {
        "format": _FORMAT,
        "estimator": model.estimator,
        "parameters": {k: to_json(v) for k, v in model.parameters.items()},
        "network": asdict(fitted.config),
        "preprocessing": asdict(fitted.preprocessing),
        "target": fitted.target.to_document(),
        **asdict(model.record),
        "selection": [row.to_dict() for row in model.record.selection],
        "n_features_in": model.n_features_in,
        "feature_names_in": None if names is None else names.tolist(),
    }
    write_tensors(Path(path).expanduser(), fitted.network.state_dict(), document)


def load_model(path: str | os.PathLike[str], estimators: Sequence[str]) -> SavedModel:
    """Read a file that `save_model` has written.

    Parameters
    ----------
    path : str or path-like
        Name of the file.
    estimators : sequence of str
        Names of the class that loads the file and of its base classes; the file must
        be of one of them.

    Returns
    -------
    SavedModel

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is another file or damaged, or if its backbone is unknown.
    """
    tensors, document = read_tensors(Path(path).expanduser())
    estimator = estimators[0]
    if document.get("format") != _FORMAT or (
        document.get("estimator") not in estimators
    ):
        raise ValueError(
            f"{str(path)!r} must be a file of {estimator}.save. Got a file of the "
            f"format {document.get('format')!r} and the estimator "
            f"{document.get('estimator')!r}."
        )
    try:
        return _parse(document, tensors)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} must be an unchanged file of {estimator}.save, and its "
            f"backbone must be known. Got: {' '.join(str(error).split())}"
        ) from error


def _parse(document: dict[str, Any], tensors: dict[str, Tensor]) -> SavedModel:
    parameters = _get(document, "parameters", dict)
    names = document.get("feature_names_in")
    if names is not None:
        _require(_is_list_of(names, str), "its feature names must be a list of str")
        names = np.array(names, dtype=object)
    n_features = document.get("n_features_in")
    _require(
        n_features is None or (type(n_features) is int and n_features > 0),
        "its number of features must be a positive int",
    )
    history = _get(document, "history", list)
    _require(
        all(
            isinstance(row, dict)
            and {"epoch", "train_loss"} <= row.keys()
            and type(row["epoch"]) is int
            and all(type(value) in _NUMBER for value in row.values())
            for row in history
        ),
        "its history must be a list of rows of numbers",
    )
    epochs = [row["epoch"] for row in history]
    best_epoch = _get(document, "best_epoch", int)
    first = epochs[0] if epochs else 1
    _require(
        first in (0, 1) and epochs == list(range(first, first + len(epochs))),
        "its history must have consecutive epochs from 0 or 1",
    )
    _require(best_epoch in {0, *epochs}, "its best epoch must be in its history")
    lr, alpha = (_get(document, name, _NUMBER) for name in ("lr", "wise_ft_alpha"))
    _require(0 <= lr < MAX_NUMBER and 0 <= alpha <= 1, "its lr and alpha are invalid")
    head_init = _get(document, "head_init", str)
    _require(head_init in HEAD_INITS, f"its head_init {head_init!r} is unknown")
    return SavedModel(
        _get(document, "estimator", str),
        {name: from_json(value) for name, value in parameters.items()},
        _parse_fitted(document, tensors),
        TrainingRecord(
            history,
            best_epoch,
            float(lr),
            head_init,
            float(alpha),
            parse_selection(document.get("selection")),
        ),
        n_features,
        names,
    )


def _parse_fitted(document: dict[str, Any], tensors: dict[str, Tensor]) -> FittedModel:
    config = _parse_config(_get(document, "network", dict))
    described = _get(document, "target", dict)
    kind = _get(described, "kind", str)
    _require(kind in _TARGETS, f"its kind of target {kind!r} is unknown")
    target = _TARGETS[kind](described)
    network = _build_network(config, target.n_outputs, tensors)
    return FittedModel(
        network,
        _parse_preprocessing(_get(document, "preprocessing", dict)),
        target,
        config,
        network_digest(network),
        # Which parts have the weights of the backbone is not saved, so that nothing
        # that is cached for the backbone is used.
        PretrainedPrefix(0, BackboneSpec(config.backbone, None, 0, "")),
        None,
    )


def _parse_config(document: dict[str, Any]) -> ModelConfig:
    size, resize = document.get("image_size"), document.get("resize")
    widths = _get(document, "hidden_layer_sizes", list)
    _require(size is None or type(size) is int, "its image_size must be an int or None")
    _require(
        resize is None or resize in RESIZE_MODES,
        f"its resize must be None or one of {list(RESIZE_MODES)}",
    )
    _require(
        all(type(width) is int and 0 < width <= _MAX_WIDTH for width in widths),
        f"its hidden_layer_sizes must be ints from 1 to {_MAX_WIDTH}",
    )
    dropout = _get(document, "dropout", _NUMBER)
    _require(0 <= dropout < 1, "its dropout must be in [0, 1)")
    return ModelConfig(
        _get(document, "backbone", str),
        _get(document, "weights", str),
        size,
        resize,
        tuple(widths),
        float(dropout),
    )


def _parse_preprocessing(document: dict[str, Any]) -> Preprocessing:
    mean, std = _get(document, "mean", list), _get(document, "std", list)
    _require(
        _is_list_of(mean + std, int, float)
        and all(abs(value) < _MAX_NORMALIZATION for value in mean + std),
        "its mean and std must be lists of small numbers",
    )
    return Preprocessing(
        _get(document, "resize_size", int),
        _get(document, "crop_size", int),
        _get(document, "interpolation", str),
        tuple(mean),
        tuple(std),
        _get(document, "resize", str),
    )


def _build_network(
    config: ModelConfig, n_outputs: int, tensors: dict[str, Tensor]
) -> nn.Sequential:
    backbone = load_backbone(config.backbone, None)
    # No memory is allocated for the widths in the file, which may be invalid.
    with float32_default(), preserve_rng_state(), skip_weight_allocation():
        network = replace_head(
            backbone,
            n_outputs,
            hidden_layer_sizes=config.hidden_layer_sizes,
            dropout=config.dropout,
        )
    load_weights_into(network, tensors, "Those of the file")
    return network.eval()


def _get(document: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = document.get(name)
    # A bool is an int to isinstance, but not to JSON.
    valid = isinstance(value, kind) and not isinstance(value, bool)
    _require(valid, f"its {name!r} is missing or has an invalid type")
    return value


def _is_list_of(values: Any, *kinds: type) -> bool:
    return isinstance(values, list) and all(type(value) in kinds for value in values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
