"""Merges BatchNorm into the convolutions before it, where that changes nothing."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

_MADE_BY = "_sktl_made_by"  # attribute of a tensor: the convolution it comes from
_TOLERANCE = 1e-5  # of the largest output, float32


def fuse_batch_norm(network: nn.Module, side: int) -> int:
    """Merge every BatchNorm into the convolution whose output it alone reads.

    Which pairs there are is seen in one pass of a random image, so it needs no
    knowledge of the architecture. Modules with hooks are left alone: somebody wants
    to see what goes in or comes out of them.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode, float32, on the CPU. It is changed in place.
    side : int
        Side in pixels of the image.

    Returns
    -------
    int
        Number of pairs merged: 0, and the network as it was, where there is none, or
        where the output would move by more than 1e-5 of the largest value (as it does
        when something else reads the convolution too).
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, side, side, generator=generator)
    pairs, before = _conv_bn_pairs(network, image)
    unfolded = []
    for name, bn_name in pairs:
        conv, bn = network.get_submodule(name), network.get_submodule(bn_name)
        unfolded += [(name, conv), (bn_name, bn)]
        # In float64, so that the weights are rounded once.
        folded = fuse_conv_bn_eval(
            cast(nn.Conv2d, copy.deepcopy(conv).double()),
            cast(nn.BatchNorm2d, copy.deepcopy(bn).double()),
        )
        network.set_submodule(name, folded.float())
        network.set_submodule(bn_name, nn.Identity())
    moved = (network(image) - before).abs().max() if pairs else 0
    if moved <= _TOLERANCE * before.abs().max():
        return len(pairs)
    for name, module in unfolded:
        network.set_submodule(name, module)
    return 0


def _conv_bn_pairs(
    network: nn.Module, image: Tensor
) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of the convolutions and BatchNorms that follow each other, and the output.

    Each of the two runs exactly once, and what the one gives is what the other gets.
    """
    found: list[tuple[str, str]] = []
    ran: list[str] = []

    def after_conv(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            ran.append(name)
            setattr(out, _MADE_BY, name)

        return hook

    def before_bn(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ran.append(name)
            if hasattr(inputs[0], _MADE_BY):
                found.append((getattr(inputs[0], _MADE_BY), name))

        return hook

    handles = []
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        if isinstance(module, nn.Conv2d) and not is_parametrized(module):
            handles.append(module.register_forward_hook(after_conv(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_bn(name)))
    output = network(image)
    for handle in handles:
        handle.remove()
    convs = [conv for conv, _ in found]
    once = [
        (conv, bn)
        for conv, bn in found
        if ran.count(conv) == ran.count(bn) == convs.count(conv) == 1
    ]
    return once, output
