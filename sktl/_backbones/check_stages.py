"""Compare the stages and the head of a network with the network."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sktl._backbones.stages import StagedModel

_SMALL_SIDE = 112


def check_staged_model(
    network: nn.Module, staged: StagedModel, image_size: int, n_channels: int = 3
) -> None:
    """Raise if stages and head are not equivalent to the network.

    Parameters
    ----------
    network : Module
        In evaluation mode, on the CPU.
    staged : StagedModel
        Its stages and head.
    image_size : int
        Side in pixels of the random images for which outputs are compared, and for
        small images also at twice the side, if the network supports it.
    n_channels : int, default=3
        Number of channels of the images.

    Raises
    ------
    ValueError
        If a parameter or buffer of a stage is not one of the network, or the outputs
        differ by more than the rounding errors of float32.
    """
    kind = type(network).__name__
    known = {*network.parameters(), *network.buffers()}
    parts = staged.stages.values()
    if any(not known.issuperset((*p.parameters(), *p.buffers())) for p in parts):
        raise ValueError(
            f"The `stages` of a {kind} must be its own modules; otherwise training the "
            "stages does not train the network. Got parameters or buffers that are not "
            "those of the network. Make `stages` a ModuleDict or a ModuleList."
        )
    _check_output(network, staged, _random_images(image_size, n_channels))
    # Small images may end in one position, where wrong pooling goes unnoticed.
    if image_size <= _SMALL_SIDE:
        larger = _random_images(2 * image_size, n_channels)
        is_supported = False
        with contextlib.suppress(Exception), torch.inference_mode():
            network(larger.clone())
            is_supported = True
        if is_supported:
            _check_output(network, staged, larger)


def _random_images(side: int, n_channels: int) -> Tensor:
    shape = (2, n_channels, side, side)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _check_output(network: nn.Module, staged: StagedModel, x: Tensor) -> None:
    kind = type(network).__name__
    cause: Exception | None = None
    with torch.inference_mode():
        expected = network(x.clone())
        try:
            is_same = _is_close(staged(x.clone()), expected)
        except Exception as error:  # wrong modules may raise anything
            is_same, cause = False, error
    if not is_same:
        calls = [_record_calls(network, run, x) for run in (network, staged)]
        raise ValueError(
            f"The `stages` of a {kind}, run in order, followed by its `head`, must "
            f"have the output of the network. Got {_first_difference(*calls)}. Each "
            "operation of `forward` must be a module of a stage or of the head."
        ) from cause


def _record_calls(
    network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> list[tuple[str, Tensor]]:
    """Return the names and inputs of the modules that run, in the order of the calls.

    These are the modules of the network without children. At the end is the output of
    the run, with an empty name, unless it raised an exception.
    """
    calls: list[tuple[str, Tensor]] = []

    def record(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            calls.append((name, inputs[0].clone()))

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=n: record(name, inputs))
        for n, module in network.named_modules()
        if n and next(module.children(), None) is None
    ]
    # The caller reports the exception.
    with torch.inference_mode(), contextlib.suppress(Exception):
        calls.append(("", run(x.clone())))
    for hook in hooks:
        hook.remove()
    return calls


def _first_difference(
    expected: list[tuple[str, Tensor]], got: list[tuple[str, Tensor]]
) -> str:
    """Describe the first call of two runs that is not the same."""
    before = "at the beginning"
    for (name, wanted), (other, found) in zip(expected, got, strict=False):
        if other != name:
            runs = repr(other) if other else "no other module"
            return f"{before} {runs}, where the network runs {name or 'none'!r}"
        what = f"the input of {name!r}" if name else "the output"
        if found.shape != wanted.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
            return f"{what} with the shape {shapes}"
        if not _is_close(found, wanted):
            return f"{what} with other values, {before}"
        before = f"after {name!r}"
    return f"an error {before}"


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True
    )
