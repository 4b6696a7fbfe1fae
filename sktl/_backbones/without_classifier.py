"""Penultimate features of registered networks whose structure does not define them.

They are the output of a network without its last linear layer, if that layer is the
last operation; and the output of the head, if it has no linear layer.
"""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from sktl._backbones.source import NetworkStructure
from sktl._backbones.stages import last_linear
from sktl._images.preprocessing import Preprocessing
from sktl._utils.default_dtype import float32_default_if_needed


def find_neck(
    network: nn.Module, structure: NetworkStructure, preprocessing: Preprocessing
) -> list[nn.Module] | None:
    """Return the blocks to the penultimate features, as in `NetworkStructure`.

    Parameters
    ----------
    network : Module
        Network in evaluation mode, which runs for two images.
    structure : NetworkStructure
        Its structure, without a neck.
    preprocessing : Preprocessing
        Size and number of channels of the images.

    Returns
    -------
    list of Module or None
        None if the penultimate features are those before the last linear layer of the
        head, or are not one vector for each image.
    """
    last = last_linear(network, structure)
    if structure.reason_not_staged is None:
        if last is None and _returns_vectors(network, preprocessing):
            return list(structure.head)
        return None
    without = None if last is None else _remove(network, last, preprocessing)
    return None if without is None else [without]


class _Recorder(nn.Identity):
    """In the place of a layer: returns its input, and keeps what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def forward(self, input: Tensor) -> Tensor:
        # torch refuses to change a leaf that requires a gradient in place. Below the
        # layer gradients are disabled, as they would need memory for all activations.
        torch.set_grad_enabled(True)
        self.outputs.append(input.detach().requires_grad_())
        return self.outputs[-1]


def _remove(
    network: nn.Module, layer: str, preprocessing: Preprocessing
) -> nn.Module | None:
    """Return a network without its last layer, or None if that is not the last step."""
    parent, _, name = layer.rpartition(".")
    if not layer:  # the network is a linear layer
        return None
    path = parent.split(".") if parent else []
    above = [network.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)]
    # Other modules are those of the network itself, with its parameters and hooks.
    shared = [module for module in network.modules() if module not in above]
    memo: dict[int, Any] = {
        id(each): each for each in [*shared, *network.parameters(), *network.buffers()]
    }
    without = copy.deepcopy(network, memo)
    recorder = _Recorder()
    setattr(without.get_submodule(parent), name, recorder)
    output = _run(without, preprocessing)
    # The same object, so nothing follows. Values could not be compared on the meta
    # device, where they do not exist.
    if len(recorder.outputs) != 1 or output is not recorder.outputs[0]:
        return None
    setattr(without.get_submodule(parent), name, nn.Identity())
    return without if _is_vector(output) else None


def _returns_vectors(network: nn.Module, preprocessing: Preprocessing) -> bool:
    return _is_vector(_run(network, preprocessing))


def _is_vector(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 2 and len(output) == 2


def _run(network: nn.Module, preprocessing: Preprocessing) -> Any:
    """Return the output of a network for two images, or None if it fails.

    A `_Recorder` enables gradients until this function returns.
    """
    side, first = preprocessing.crop_size, next(network.parameters(), None)
    images = torch.zeros(
        (2, preprocessing.n_channels, side, side),
        dtype=torch.float32,
        device="cpu" if first is None else first.device,
    )
    # Broad on purpose: a network of the user may fail in any way.
    with contextlib.suppress(Exception):
        with torch.no_grad(), float32_default_if_needed():
            return network(images)
    return None
