"""What a layer's name means, and how its output becomes one row of a table.

A layer is ``"penultimate"`` (what the network's own last linear layer sees), the name
of a stage, or the name of any module of the network. Its output is pooled to a vector;
several layers are computed in one pass and stand side by side in the order given.
"""

import copy
import difflib
import re
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from sktl._backbones.backbone import Backbone

PENULTIMATE = "penultimate"


class FeatureExtractor(nn.Module):
    """A network that answers with features instead of logits.

    It owns a copy of the backbone's network, so that hooks, folding and a change of
    precision never touch the copy that others share.

    Parameters
    ----------
    backbone : Backbone
        Where the network, its stages and its last linear layer come from.
    layers : sequence of str
        ``"penultimate"``, names of stages, or names of modules. Of the names of stages
        and modules, those of stages win.
    pooling : {"avg", "max", "gem", "flatten"} or int
        See `pool`.

    Attributes
    ----------
    widths : tuple of int
        Number of columns of each layer, known from the first pass on.

    Raises
    ------
    ValueError
        If a name is none of the backbone's, with the closest ones.
    """

    widths: tuple[int, ...]

    def __init__(
        self, backbone: Backbone, layers: Sequence[str], pooling: str | int
    ) -> None:
        super().__init__()
        self._layers = tuple(layers)
        self._pooling = pooling
        stages = backbone.staged_model.stages if backbone.staged_model else {}
        for layer in self._layers:
            _check_layer(layer, backbone, stages)

        self._stages = [name for name in stages if name in self._layers]
        if len(self._stages) == len(self._layers):
            # Nothing above the highest stage asked for is computed, or even copied.
            above = list(stages).index(self._stages[-1]) + 1
            self._parts = nn.ModuleDict(
                copy.deepcopy(dict(list(stages.items())[:above]))
            )
            network = None
        else:
            parts = {**stages, "head": backbone.head} if self._stages else {}
            # One call, so that what is shared before is shared after.
            network, parts = copy.deepcopy((backbone.network, parts))
            self._parts = nn.ModuleDict(parts or {"network": network})

        # One network may serve several threads, each with its own pass under way.
        self._pass = threading.local()
        for layer in self._layers:
            if layer in stages or network is None:
                continue
            if layer == PENULTIMATE:
                module = network.get_submodule(backbone.penultimate)
                module.register_forward_pre_hook(self._keep_input(layer))
            else:
                channels_last = _is_channels_last(network, layer)
                module = network.get_submodule(layer)
                module.register_forward_hook(self._keep_output(layer, channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Turn images ``(n, 3, h, w)`` into features ``(n, n_features)``, float32."""
        n = x.shape[0]
        rows: dict[str, Tensor] = {}
        self._pass.rows = rows
        for name, part in self._parts.items():
            x = part(x)
            if name in self._stages:
                rows[name] = pool(x, self._pooling, name)
        for layer in self._layers:
            if layer not in rows:
                beside = " stage by stage" if self._stages else ""
                raise ValueError(
                    f"The module {layer!r} does not run when the network predicts"
                    f"{beside}, so it has no features. Choose another layer"
                    f"{', or join it by a FeatureUnion' if beside else ''}."
                )
            if rows[layer].shape[0] != n:
                raise ValueError(
                    f"The module {layer!r} gives {rows[layer].shape[0]} rows for {n} "
                    "images, so they are not features of them. Choose another layer."
                )
        columns = [rows[layer] for layer in self._layers]
        self.widths = tuple(column.shape[1] for column in columns)
        return torch.cat(columns, dim=1)  # (n, k_1), (n, k_2), ... -> (n, sum of k)

    def _keep_input(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._pass.rows[layer] = pool(inputs[0], self._pooling, layer)

        return hook

    def _keep_output(self, layer: str, channels_last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: object) -> None:
            if not isinstance(out, Tensor):
                raise ValueError(
                    f"The module {layer!r} gives a {type(out).__name__}, and features "
                    "are made of a tensor. Choose a module inside or above it."
                )
            if channels_last and out.ndim == 4:
                out = out.permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
            self._pass.rows[layer] = pool(out, self._pooling, layer)

        return hook


def pool(x: Tensor, pooling: str | int, layer: str) -> Tensor:
    """Turn the output of a layer into one vector per image.

    Parameters
    ----------
    x : Tensor
        Of shape ``(n, channels)``, ``(n, channels, h, w)`` or, from a transformer,
        ``(n, tokens, channels)``.
    pooling : {"avg", "max", "gem", "flatten"} or int
        ``"avg"`` and ``"max"`` over positions, ``"gem"`` the generalized mean with
        exponent 3 [1]_, ``"flatten"`` every value, an int k the averages over a grid
        of k x k fields. A layer that has no positions is left as it is.
    layer : str
        Its name, for the error.

    Returns
    -------
    Tensor
        Of shape ``(n, n_features)``, float32; it shares no memory with `x`, which the
        network may go on to overwrite.

    References
    ----------
    .. [1] Radenović, Tolias, Chum: *Fine-tuning CNN Image Retrieval with No Human
       Annotation*, 2019.
    """
    x = x.float()
    if x.ndim == 2:
        return x.clone()
    if pooling == "flatten":
        return x.flatten(1).clone()  # (n, c, h, w) -> (n, c * h * w)
    if x.ndim == 3 and not isinstance(pooling, int):
        x = x.transpose(1, 2)  # (n, tokens, c) -> (n, c, tokens)
    elif x.ndim == 4 and isinstance(pooling, int):
        return F.adaptive_avg_pool2d(x, pooling).flatten(1)  # (n, c * k * k)
    elif x.ndim == 4:
        x = x.flatten(2)  # (n, c, h, w) -> (n, c, positions)
    else:
        raise ValueError(
            f"pooling={pooling!r} needs a layer with rows and columns, and {layer!r} "
            f"gives the shape {tuple(x.shape[1:])} per image. Choose another pooling."
        )
    if pooling == "avg":
        return x.mean(2)
    if pooling == "max":
        return x.amax(2)
    assert pooling == "gem"
    return x.clamp(min=1e-6).pow(3).mean(2).pow(1 / 3)


def _check_layer(layer: str, backbone: Backbone, stages: dict[str, nn.Module]) -> None:
    modules = [name for name, _ in backbone.network.named_modules() if name]
    # Some networks have modules called stage2 that are not the stage of that depth:
    # in these words a name means the stage, whatever the network.
    is_depth = re.fullmatch(r"stem|stage\d+", layer) is not None
    if layer in stages or (layer in modules and not (is_depth and stages)):
        return
    if layer == PENULTIMATE:
        _ = backbone.penultimate  # or says that there is none
        return
    if is_depth:
        _ = backbone.stages  # or says why there are none
    close = difflib.get_close_matches(layer, [PENULTIMATE, *stages, *modules], n=5)
    raise ValueError(
        "The 'layer' parameter must be 'penultimate', the name of a stage "
        f"({', '.join(stages) or 'this network has none'}) or of a module of "
        f"{backbone.name!r}. Got {layer!r} instead."
        f"{' The closest: ' + ', '.join(close) + '.' if close else ''}"
    )


def _is_channels_last(network: nn.Module, layer: str) -> bool:
    """Say whether a module's maps are ``(n, h, w, c)``.

    Raises
    ------
    ValueError
        If its four axes are neither that nor ``(n, c, h, w)``.
    """
    module = network.get_submodule(layer)
    if isinstance(network, models.MaxVit) and "_attention." in layer:
        raise ValueError(
            f"The axes of {layer!r} are images, windows, positions and channels, "
            "which cannot be pooled. Choose the whole attention layer, or a stage."
        )
    if isinstance(network, models.SwinTransformer):
        inside = layer.split(".")[0] in {"features", "norm"}
        return inside and not isinstance(module, nn.Conv2d)
    if isinstance(network, models.ConvNeXt):
        # Between its two permutations: norm, linear, activation, linear.
        return re.search(r"\.block\.[1-5]$", layer) is not None
    return False
