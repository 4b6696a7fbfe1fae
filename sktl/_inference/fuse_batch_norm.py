"""Fuses BatchNorm layers into the convolutions before them, where this is exact."""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

_SOURCE = "_sktl_conv_name"  # attribute of a tensor: name of the convolution it is from
_TOLERANCE = 1e-5  # relative to the largest output, float32


def fuse_batch_norm(network: nn.Module, side: int, n_channels: int = 3) -> int:
    """Fuse each BatchNorm into the convolution whose output only it reads.

    The pairs are found in one forward pass with a random image, so no knowledge of the
    architecture is needed. Modules with hooks are skipped, since their inputs and
    outputs must not change.

    Parameters
    ----------
    network : Module
        In evaluation mode, float32, on the CPU. Modified in place.
    side : int
        Side of the image in pixels.
    n_channels : int, default=3
        Number of channels of the image.

    Returns
    -------
    int
        Number of fused pairs. 0, with the network unchanged, if there are none, or if
        the output would change by more than 1e-5 of its largest value, as it does when
        another module also reads the output of the convolution.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, n_channels, side, side)
    image = torch.randn(shape, generator=generator, dtype=torch.float32)
    pairs, expected = _conv_bn_pairs(network, image)
    original = []
    for name, bn_name in pairs:
        conv, bn = network.get_submodule(name), network.get_submodule(bn_name)
        original += [(name, conv), (bn_name, bn)]
        # In float64, so that the weights are rounded once.
        fused = fuse_conv_bn_eval(
            cast(nn.Conv2d, copy.deepcopy(conv).double()),
            cast(nn.BatchNorm2d, copy.deepcopy(bn).double()),
        )
        network.set_submodule(name, fused.float())
        network.set_submodule(bn_name, _after_normalization(bn))
    difference = (network(image) - expected).abs().max() if pairs else 0
    if difference <= _TOLERANCE * expected.abs().max():
        return len(pairs)
    for name, module in original:
        network.set_submodule(name, module)
    return 0


def _after_normalization(bn: nn.Module) -> nn.Module:
    """Return what a BatchNorm does besides normalizing.

    That of timm applies an activation, its attribute ``act``.
    """
    act = getattr(bn, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def _conv_bn_pairs(
    network: nn.Module, image: Tensor
) -> tuple[list[tuple[str, str]], Tensor]:
    """Find the convolutions that are followed by a BatchNorm.

    Both modules of a pair run exactly once, and the output of the convolution is the
    input of the BatchNorm.

    Parameters
    ----------
    network : Module
        In evaluation mode.
    image : Tensor of shape (1, n_channels, side, side)
        Input of the forward pass.

    Returns
    -------
    pairs : list of (str, str)
        Names of convolution and BatchNorm.
    output : Tensor
        Output of the network.
    """
    found: list[tuple[str, str]] = []
    calls: list[str] = []

    def after_conv(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            calls.append(name)
            setattr(out, _SOURCE, name)

        return hook

    def before_bn(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls.append(name)
            if hasattr(inputs[0], _SOURCE):
                found.append((getattr(inputs[0], _SOURCE), name))

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
    pairs = [
        (conv, bn)
        for conv, bn in found
        if calls.count(conv) == calls.count(bn) == convs.count(conv) == 1
    ]
    return pairs, output
