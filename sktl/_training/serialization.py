"""Saved models: parameters, fitted attributes and weights in one safetensors file.

Nothing in the file is executed when it is loaded. Everything in it is validated, so
that a file that was made by hand raises a ValueError.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sktl._backbones.registry import BackboneSpec, load_backbone
from sktl._backbones.saved_network import (
    FORMAT,
    from_saved_names,
    parse_architecture,
    parse_preprocessing,
)
from sktl._backbones.saved_registration import (
    check_trusted,
    registration_to_document,
    restore_registration,
)
from sktl._backbones.source import HeadConfig, NetworkStructure
from sktl._backbones.weights import load_weights_into
from sktl._images.preprocessing import RESIZE_MODES
from sktl._training.config import (
    HEAD_INITS,
    MAX_NUMBER,
    TrainingRecord,
    order_columns,
    parse_selection,
)
from sktl._training.initial_model import (
    FittedModel,
    InitialModel,
    ModelConfig,
    PretrainedPrefix,
)
from sktl._training.multiclass import multiclass_from_document
from sktl._training.multilabel import multilabel_from_document
from sktl._training.network import network_digest
from sktl._training.regression import regression_from_document
from sktl._training.targets import Target
from sktl._utils.default_dtype import float32_default
from sktl._utils.json_values import (
    from_json,
    get_value,
    is_list_of,
    require,
    to_json,
)
from sktl._utils.random_state import preserve_rng_state
from sktl._utils.tensor_file import read_tensors, write_tensors

# A new kind of target adds the function that reads its document.
_TARGETS: dict[str, Callable[[dict[str, Any]], Target]] = {
    "multiclass": multiclass_from_document,
    "multilabel": multilabel_from_document,
    "regression": regression_from_document,
}
_NUMBER = (int, float)


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
        If the labels are not str, int, float or bool, or other processes cannot import
        the builder of a registered backbone.
    """
    fitted = model.fitted
    document = {
        **_describe(
            fitted,
            fitted.target,
            estimator=model.estimator,
            parameters=model.parameters,
            n_features_in=model.n_features_in,
            feature_names_in=model.feature_names_in,
        ),
        **asdict(model.record),
        "selection": [row.to_dict() for row in model.record.selection],
    }
    tensors = {
        fitted.saved_names[name]: tensor
        for name, tensor in fitted.network.state_dict().items()
    }
    write_tensors(Path(path).expanduser(), tensors, document)


def describe_model(
    estimator: Any, model: InitialModel, target: Target
) -> dict[str, Any]:
    """Return what a file of `save_model` has before the training.

    Parameters
    ----------
    estimator : FineTunedCNNClassifier
        Its parameters are read, and the features that it has seen.
    model : InitialModel
        The network that is trained.
    target : Target
        Decodes the outputs.

    Returns
    -------
    dict of str
        The names of parameters that cannot be saved are in ``"not_saved"``. If the
        model cannot be saved, the only key is ``"reason"``.
    """
    parameters, others = split_parameters(estimator.get_params(deep=False))
    try:
        description = _describe(
            model,
            target,
            estimator=type(estimator).__name__,
            parameters=parameters,
            n_features_in=getattr(estimator, "n_features_in_", None),
            feature_names_in=getattr(estimator, "feature_names_in_", None),
        )
    except TypeError as error:
        return {"reason": str(error)}
    return {**description, "not_saved": others}


def _describe(
    model: InitialModel | FittedModel,
    target: Target,
    *,
    estimator: str,
    parameters: Mapping[str, Any],
    n_features_in: int | None,
    feature_names_in: NDArray[np.object_] | None,
) -> dict[str, Any]:
    """Return what a file has of an estimator, besides the record of its training."""
    names = feature_names_in
    config = asdict(model.config)
    for field in fields(HeadConfig):  # they are in the last head of the architecture
        del config[field.name]
    return {
        "format": FORMAT,
        "estimator": estimator,
        "parameters": {k: to_json(v) for k, v in parameters.items()},
        "n_features_in": n_features_in,
        "feature_names_in": None if names is None else names.tolist(),
        "network": config,
        "architecture": asdict(model.architecture),
        "registration": registration_to_document(
            model.pretrained.backbone.registration
        ),
        "preprocessing": asdict(model.preprocessing),
        "target": target.to_document(),
    }


def load_model(
    path: str | os.PathLike[str],
    estimators: Sequence[str],
    trusted: Sequence[str] = (),
) -> SavedModel:
    """Read a file that `save_model` has written.

    Parameters
    ----------
    path : str or path-like
        Name of the file.
    estimators : sequence of str
        Names of the class that loads the file and of its base classes; the file must
        be of one of them.
    trusted : sequence of str, default=()
        References of builders of registered backbones that may be imported.

    Returns
    -------
    SavedModel

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is another file or damaged, or if its backbone is unknown.
    TypeError
        If `trusted` is not a list of str.
    """
    tensors, document = read_tensors(Path(path).expanduser())
    state_dict = functools.partial(from_saved_names, tensors)
    return parse_model(document, state_dict, str(path), estimators, trusted)


def parse_model(
    document: dict[str, Any],
    state_dict: Callable[[NetworkStructure], dict[str, Tensor]],
    path: str,
    estimators: Sequence[str],
    trusted: Sequence[str],
    *,
    origin: str = "load",
) -> SavedModel:
    """Return the model that a document and a state dict describe.

    Parameters
    ----------
    document : dict of str
        As `save_model` writes it; anything may be in it.
    state_dict : callable
        Returns the weights of a network of a structure.
    path, estimators, trusted
        As in `load_model`, which also describes the errors.
    origin : str, default="load"
        Method of the estimator that reads the file.

    Returns
    -------
    SavedModel
    """
    estimator = estimators[0]
    kind = f"file of {estimator}.save"
    if origin != "load":
        kind = f"checkpoint of {estimator}"
    if document.get("format") != FORMAT or (
        document.get("estimator") not in estimators
    ):
        raise ValueError(
            f"{path!r} must be a {kind}. Got a file of the "
            f"format {document.get('format')!r} and the estimator "
            f"{document.get('estimator')!r}. A network of an older version must be "
            "fitted and saved again."
        )
    check_trusted(document, trusted, path=path, method=f"{estimator}.{origin}")
    try:
        restore_registration(document)
        return _parse(document, state_dict)
    except ValueError as error:
        raise ValueError(
            f"{path!r} must be an unchanged {kind}, and its "
            f"backbone must be known. Got: {' '.join(str(error).split())}"
        ) from error


def _parse(
    document: dict[str, Any],
    state_dict: Callable[[NetworkStructure], dict[str, Tensor]],
) -> SavedModel:
    parameters = get_value(document, "parameters", dict)
    names = document.get("feature_names_in")
    if names is not None:
        require(is_list_of(names, str), "its feature names must be a list of str")
        names = np.array(names, dtype=object)
    n_features = document.get("n_features_in")
    require(
        n_features is None or (type(n_features) is int and n_features > 0),
        "its number of features must be a positive int",
    )
    history = get_value(document, "history", list)
    require(
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
    best_epoch = get_value(document, "best_epoch", int)
    first = epochs[0] if epochs else 1
    require(
        first in (0, 1) and epochs == list(range(first, first + len(epochs))),
        "its history must have consecutive epochs from 0 or 1",
    )
    require(best_epoch in {0, *epochs}, "its best epoch must be in its history")
    lr, alpha = (get_value(document, name, _NUMBER) for name in ("lr", "wise_ft_alpha"))
    require(0 <= lr < MAX_NUMBER and 0 <= alpha <= 1, "its lr and alpha are invalid")
    head_init = get_value(document, "head_init", str)
    require(head_init in HEAD_INITS, f"its head_init {head_init!r} is unknown")
    return SavedModel(
        get_value(document, "estimator", str),
        {name: from_json(value) for name, value in parameters.items()},
        _parse_fitted(document, state_dict),
        TrainingRecord(
            [order_columns(row) for row in history],
            best_epoch,
            float(lr),
            head_init,
            float(alpha),
            parse_selection(document.get("selection")),
        ),
        n_features,
        names,
    )


def _parse_fitted(
    document: dict[str, Any],
    state_dict: Callable[[NetworkStructure], dict[str, Tensor]],
) -> FittedModel:
    architecture = parse_architecture(document)
    config = _parse_config(get_value(document, "network", dict), architecture.heads[-1])
    described = get_value(document, "target", dict)
    kind = get_value(described, "kind", str)
    require(kind in _TARGETS, f"its kind of target {kind!r} is unknown")
    target = _TARGETS[kind](described)
    # Only the heads are built without memory and random numbers.
    backbone = load_backbone(architecture.backbone, None)
    with float32_default(), preserve_rng_state():
        built = architecture.build(backbone, target.n_outputs)
    weights = state_dict(built.structure)
    load_weights_into(built.network, weights, "Those of the file")
    network = cast(nn.Sequential, built.network.eval())
    return FittedModel(
        network,
        parse_preprocessing(document),
        target,
        config,
        architecture,
        dict(built.structure.saved_names or {}),
        network_digest(network),
        # Which parts have the weights of the backbone is not saved, so that nothing
        # that is cached for the backbone is used.
        PretrainedPrefix(0, replace(BackboneSpec.to(backbone, None), digest="")),
        None,
    )


def _parse_config(document: dict[str, Any], head: HeadConfig) -> ModelConfig:
    size, resize = document.get("image_size"), document.get("resize")
    require(size is None or type(size) is int, "its image_size must be an int or None")
    require(
        resize is None or resize in RESIZE_MODES,
        f"its resize must be None or one of {list(RESIZE_MODES)}",
    )
    return ModelConfig(
        get_value(document, "backbone", str),
        get_value(document, "weights", str),
        size,
        resize,
        head.hidden_layer_sizes,
        head.dropout,
    )
