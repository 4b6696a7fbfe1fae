"""`describe_backbone`: the layers of a network, their sizes and costs."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from os import PathLike, fspath
from typing import Any

import torch
from sklearn.utils import Bunch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sktl._backbones.backbone import Backbone
from sktl._backbones.feature_extractor import (
    PENULTIMATE,
    FeatureExtractor,
    reraise_invalid_size,
)
from sktl._backbones.new_head import HEAD
from sktl._backbones.registry import declare_without_weights
from sktl._backbones.source import is_path
from sktl._backbones.stages import last_linear
from sktl._inference.parameter_constraints import SHARED_CONSTRAINTS
from sktl._store.shard import BYTES_BESIDES_ROW
from sktl._utils.default_dtype import float32_default_if_needed
from sktl._utils.sklearn_compat import validate_parameter_constraints

_BYTES_PER_VALUE = 4  # rows are cached as float32
_COLUMNS = (
    "part",
    "channels",
    "positions",
    "parameters",
    "multiply-adds",
    "cached features",
    "cached activations",
)
_CONSTRAINTS = {
    "name": SHARED_CONSTRAINTS["backbone"],
    "weights": SHARED_CONSTRAINTS["weights"],
    "image_size": SHARED_CONSTRAINTS["image_size"],
}


class BackboneDescription(Bunch):
    """Description of a backbone: a dict of plain values with attribute access.

    Its keys are documented in `describe_backbone`.
    """

    def __repr__(self) -> str:
        """Return the description as text: some lines, and a table of the parts."""
        facts = _facts(self)
        width = max(map(len, facts))
        lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
        rows = [list(_COLUMNS), *_cells(self["parts"])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                f"{cell:{'>' if i else '<'}{width}}"
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([self["name"], *lines, "", *table])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Return the same as an HTML table, for a notebook."""
        facts = "".join(
            f"<tr><th style='text-align: left'>{html.escape(name)}</th>"
            f"<td style='text-align: left'>{html.escape(value)}</td></tr>"
            for name, value in _facts(self).items()
        )
        header = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in _cells(self["parts"])
        )
        return (
            f"<p><b>{html.escape(self['name'])}</b></p><table>{facts}</table>"
            f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
        )


def describe_backbone(
    name: str,
    *,
    weights: str | PathLike[str] | None = "DEFAULT",
    image_size: int | None = None,
) -> BackboneDescription:
    """Describe the layers of a network, their sizes and costs.

    Weights are neither downloaded nor read: the network is built without values.

    Parameters
    ----------
    name : str
        One of `list_backbones`.

    weights : str, path-like or None, default="DEFAULT"
        As in the estimators. They determine the preprocessing, the categories and the
        license. A file that `FineTunedCNNClassifier.save` wrote has its own network.

    image_size : int or None, default=None
        Side of the images in pixels, as in the estimators. None: that of the weights.

    Returns
    -------
    BackboneDescription
        A dict of plain values, whose keys are also attributes. As text and in a
        notebook it is shown as a table. Keys:

        - ``name``, ``weights``: name of the backbone and of the weights, or the path of
          a file;
        - ``known_weights``: list of the names of weights;
        - ``license``: that of the weights, as their source states it, or None if it
          states none or `weights` is another file or None;
        - ``n_categories``: number of categories that the weights name, or None; for a
          state dict, which is not read, that of the default weights;
        - ``image_size``: side in pixels of the images that the network gets;
        - ``min_image_size``, ``is_image_size_fixed``: minimum side, and whether no
          other side is supported;
        - ``image_size_multiple``: number of pixels of which the side must be a
          multiple; 1 if it may have any size;
        - ``preprocessing``: dict of the parameters of `Preprocessing`;
        - ``n_parameters``: number of parameters;
        - ``n_multiply_adds``: multiplications and additions of a forward pass of one
          image, counted in pairs, in convolutions and matrix products; None if the
          network runs only on real values;
        - ``parts``: list of dicts, one for each stage in order; for ``"penultimate"``,
          which has what lies between the last stage and the penultimate features; and
          for ``"head"``, which has what lies above, if the network has it. Each dict
          has ``name``; ``n_channels``, ``n_rows``, ``n_columns`` of the activations,
          with rows and columns None for vectors; ``n_tokens``, the number of all tokens
          of a transformer, else None;
          ``n_parameters``; ``n_multiply_adds``; ``feature_bytes``, the size in the
          cache of the features of one image with ``pooling="avg"``; and
          ``activation_bytes``, that of one image in fine-tuning if this is the last
          frozen part, None for the head;
        - ``reason_without_stages``: why the network has no stages, or None;
        - ``param_grids``: candidates for a grid search by the name of the estimator:
          of ``layer`` for `PretrainedFeatures`, of ``trainable`` for
          `FineTunedCNNClassifier`, whose name is missing if it does not support the
          network.

    Raises
    ------
    ImportError
        If the library of the network, such as timm, is not installed.
    ValueError
        If there is no such backbone, or a parameter is invalid.

    Examples
    --------
    >>> from sktl import describe_backbone
    >>> description = describe_backbone("resnet18")
    >>> description.n_parameters
    11689512
    >>> description.param_grids["PretrainedFeatures"]
    {'layer': ['penultimate', 'stage4', 'stage3', 'stage2', 'stage1']}
    """
    validate_parameter_constraints(
        _CONSTRAINTS,
        {"name": name, "weights": weights, "image_size": image_size},
        caller_name="describe_backbone",
    )
    backbone = declare_without_weights(name, weights, on_meta=True)
    preprocessing = backbone.preprocessing_at(image_size)
    try:
        parts, n_multiply_adds = _measure_parts(backbone, preprocessing.crop_size)
    except Exception:
        # Broad on purpose: a forward method that reads values fails on the meta device
        # with exceptions of many types. The second pass raises all other errors.
        backbone = declare_without_weights(name, weights, on_meta=False)
        parts, n_multiply_adds = _measure_parts(backbone, preprocessing.crop_size)
    definition, categories = backbone.definition, backbone.categories
    return BackboneDescription(
        name=backbone.name,
        weights=_weights_name(weights, definition.weights_name),
        known_weights=list(definition.known_weights),
        license=definition.license,
        n_categories=None if categories is None else len(categories),
        image_size=preprocessing.crop_size,
        min_image_size=max(backbone.min_size, backbone.structure.side_multiple),
        is_image_size_fixed=backbone.has_fixed_image_size,
        image_size_multiple=backbone.structure.side_multiple,
        preprocessing=asdict(preprocessing),
        n_parameters=sum(each.numel() for each in backbone.network.parameters()),
        n_multiply_adds=n_multiply_adds,
        parts=parts,
        reason_without_stages=backbone.reason_without_stages,
        param_grids=_param_grids(backbone),
    )


def _weights_name(weights: str | PathLike[str] | None, resolved: str) -> str | None:
    if isinstance(weights, PathLike) or (weights is not None and is_path(weights)):
        return fspath(weights)
    return weights and (resolved or weights)


def _measure_parts(
    backbone: Backbone, side: int
) -> tuple[list[dict[str, Any]], int | None]:
    """Return the parts of a network, and the number of all multiply-adds."""
    stages = backbone.staged_model.stages if backbone.staged_model else {}
    on_meta = any(each.is_meta for each in backbone.network.parameters())
    device = "meta" if on_meta else "cpu"
    shape = (1, backbone.preprocessing.n_channels, side, side)
    image = torch.zeros(shape, device=device, dtype=torch.float32)
    layers = [*stages, *([PENULTIMATE] if _has_penultimate(backbone) else [])]
    with (
        torch.inference_mode(),
        float32_default_if_needed(),
        reraise_invalid_size(side),
    ):
        extractor = FeatureExtractor(backbone, layers, "flatten").eval()
        extractor(image)
        costs, output = _multiply_adds(backbone, stages, image)
    shapes = {name: extractor.layer_shapes[name][1:] for name in layers}
    prefixes = {name: backbone.structure.n_prefix_tokens(name) for name in layers}
    if backbone.has_classification_head:
        shapes[HEAD] = tuple(output.shape[1:])
    parameters = _count_parameters(backbone, stages)
    parts = [
        {
            "name": name,
            **_activations(shape, prefixes.get(name, 0)),
            "n_parameters": parameters[name],
            "n_multiply_adds": costs[name] if on_meta else None,
        }
        for name, shape in shapes.items()
    ]
    for part in parts:
        if part["name"] == PENULTIMATE:  # frozen activations are pooled here
            part["activation_bytes"] = part["feature_bytes"]
        elif part["name"] == HEAD:  # never frozen
            part["activation_bytes"] = None
    return parts, sum(costs.values()) if on_meta else None


def _has_penultimate(backbone: Backbone) -> bool:
    has_linear = last_linear(backbone.network, backbone.structure) is not None
    return has_linear or backbone.neck is not None


def _activations(shape: tuple[int, ...], n_prefix_tokens: int) -> dict[str, int | None]:
    """Return channels and positions of activations, and their size in the cache.

    Parameters
    ----------
    shape : tuple of int
        Of one image: ``(c,)``, ``(c, h, w)`` or ``(tokens, c)``.
    n_prefix_tokens : int
        Number of tokens that belong to no position.
    """
    n_channels, n_tokens = shape[0], None
    n_rows, n_columns = shape[1:] if len(shape) == 3 else (None, None)
    if len(shape) == 2:
        n_tokens, n_channels = shape
        side = math.isqrt(n_tokens - n_prefix_tokens)
        if side**2 == n_tokens - n_prefix_tokens:
            n_rows = n_columns = side
    return {
        "n_channels": n_channels,
        "n_rows": n_rows,
        "n_columns": n_columns,
        "n_tokens": n_tokens,
        "feature_bytes": _BYTES_PER_VALUE * n_channels + BYTES_BESIDES_ROW,
        "activation_bytes": _BYTES_PER_VALUE * math.prod(shape) + BYTES_BESIDES_ROW,
    }


def _count_parameters(
    backbone: Backbone, stages: Mapping[str, nn.Module]
) -> dict[str, int]:
    """Return the number of parameters of each part; each parameter is counted once."""
    parts = dict(stages)
    if backbone.neck is not None:
        parts |= {PENULTIMATE: backbone.neck, HEAD: backbone.network}
    elif _has_penultimate(backbone):
        parts |= {HEAD: backbone.last_linear, PENULTIMATE: backbone.network}
    counted: set[nn.Parameter] = set()
    counts = {}
    for name, part in parts.items():
        own = set(part.parameters()) - counted
        counted |= own
        counts[name] = sum(each.numel() for each in own)
    return counts


def _multiply_adds(
    backbone: Backbone, stages: Mapping[str, nn.Module], x: Tensor
) -> tuple[dict[str, int], Any]:
    """Return the number of multiply-adds of each part, and the output."""
    costs = {}
    for name, stage in stages.items():
        costs[name], x = _run(stage, x)
    above = backbone.head if stages else backbone.network
    if backbone.neck is not None:
        costs[PENULTIMATE], _ = _run(backbone.neck, x)
        total, output = _run(above, x)
        return costs | {HEAD: total - costs[PENULTIMATE]}, output
    last = backbone.last_linear if _has_penultimate(backbone) else None
    with FlopCounterMode(display=False) as counter:
        head = 0

        def add(sign: int, *_: object) -> None:
            nonlocal head
            head += sign * counter.get_total_flops() // 2

        hooks = (
            []
            if last is None
            else [
                last.register_forward_pre_hook(partial(add, -1)),
                last.register_forward_hook(partial(add, 1)),
            ]
        )
        output = above(x)
    for hook in hooks:
        hook.remove()
    below = counter.get_total_flops() // 2 - head
    return costs | {PENULTIMATE: below, HEAD: head}, output


def _run(module: nn.Module, x: Tensor) -> tuple[int, Any]:
    """Return the number of multiply-adds of a module, and its output."""
    with FlopCounterMode(display=False) as counter:
        output = module(x)
    return counter.get_total_flops() // 2, output


def _param_grids(backbone: Backbone) -> dict[str, dict[str, list[str]]]:
    """Return candidates of a grid search, by the name of the estimator."""
    stages = list(backbone.staged_model.stages) if backbone.staged_model else []
    upper = stages[:0:-1]  # from the highest stage to that above the stem
    has_penultimate = _has_penultimate(backbone)
    layers = [*([PENULTIMATE] if has_penultimate else []), *upper]
    grids = {"PretrainedFeatures": {"layer": layers or stages}}
    # Fine-tuning replaces what follows the penultimate features.
    if has_penultimate and (stages or backbone.neck is not None):
        trainable = ["head", *upper, "all"]
        grids["FineTunedCNNClassifier"] = {"trainable": trainable}
    return grids


def _facts(description: Mapping[str, Any]) -> dict[str, str]:
    """Return everything but the parts as lines of text, by their titles."""
    side, smallest = description["image_size"], description["min_image_size"]
    multiple = description["image_size_multiple"]
    sizes = f"{side} x {side} pixels"
    if description["is_image_size_fixed"]:
        sizes += ", no other size"
    elif multiple > 1:
        sizes += f", a multiple of {multiple}"
    elif smallest > 1:
        sizes += f", at least {smallest} x {smallest}"
    n_categories = description["n_categories"]
    facts = {
        "image size": sizes,
        "preprocessing": ", ".join(
            f"{name}={description['preprocessing'][name]!r}"
            for name in ("resize", "resize_size", "interpolation")
        ),
        "mean": str(description["preprocessing"]["mean"]),
        "std": str(description["preprocessing"]["std"]),
        "weights": str(description["weights"]),
        "known weights": ", ".join(description["known_weights"]),
        "license": description["license"] or "not stated by the source of the weights",
        "categories": "no names" if n_categories is None else str(n_categories),
        "parameters": f"{description['n_parameters']:,}",
        "multiply-adds": _short(description["n_multiply_adds"]),
    }
    if description["reason_without_stages"]:
        facts["no stages"] = description["reason_without_stages"]
    return facts | {k: str(grid) for k, grid in description["param_grids"].items()}


def _cells(parts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of the parts as text, in the order of `_COLUMNS`."""
    return [
        [
            part["name"],
            f"{part['n_channels']:,}",
            _positions(part),
            f"{part['n_parameters']:,}",
            _short(part["n_multiply_adds"]),
            _short(part["feature_bytes"], "B"),
            _short(part["activation_bytes"], "B"),
        ]
        for part in parts
    ]


def _positions(part: Mapping[str, Any]) -> str:
    grid = f"{part['n_rows']} x {part['n_columns']}"
    if part["n_tokens"] is None:
        return "" if part["n_rows"] is None else grid
    if part["n_rows"] is None:
        return f"{part['n_tokens']} tokens"
    n_others = part["n_tokens"] - part["n_rows"] * part["n_columns"]
    return f"{grid} + {n_others}" if n_others else grid


def _short(number: int | None, unit: str = "") -> str:
    """Return a number with three digits and the prefix of a unit: 1.81 G."""
    if number is None:
        return "" if unit else "not measured"
    value, prefixes = float(number), ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    digits = 0 if value >= 99.95 or prefixes[0] == "" else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[0]}{unit}".strip()
