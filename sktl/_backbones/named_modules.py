"""Stages and head of a network by the names of its modules.

A part is a sequence of names of modules. What a ``forward`` method does between its
modules is in the part as the text of a module of torch without parameters, such as
``"Flatten(start_dim=1, end_dim=-1)"``.
"""

import ast
import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from sktl._backbones.source import NetworkStructure

# Modules of torch.nn without parameters, in parts of networks that classify images. A
# text may come from a file, and other modules could allocate parameters without end.
_MODULES = frozenset(
    {
        *("Flatten", "Identity", "Softmax", "LogSoftmax", "LocalResponseNorm"),
        *("ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish"),
        *("Hardswish", "Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh", "Softplus"),
        *("Dropout", "Dropout1d", "Dropout2d", "AlphaDropout"),
        *("AvgPool1d", "AvgPool2d", "MaxPool1d", "MaxPool2d", "LPPool2d"),
        *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool1d"),
        *("AdaptiveMaxPool2d", "ZeroPad2d", "ReflectionPad2d", "ReplicationPad2d"),
        *("PixelShuffle", "PixelUnshuffle", "ChannelShuffle"),
    }
)
_MAX_ARGUMENT = 256  # larger maps or padding could exceed the memory


def module_to_text(module: nn.Module) -> str:
    """Return the text of a module of torch without parameters.

    Parameters
    ----------
    module : Module
        Such as ``nn.Flatten(1)``.

    Returns
    -------
    str
        `text_to_module` returns an equal module for it.

    Raises
    ------
    ValueError
        If the module has parameters, or is not defined by its text.
    """
    text = repr(module)
    try:
        is_same = _settings(text_to_module(text)) == _settings(module)
    except ValueError as error:
        raise ValueError(
            f"{error} Make it a module of the network, and pass its name."
        ) from error
    if not is_same:
        raise ValueError(
            "A module in `stages` or `head` must be of torch.nn and have no "
            f"parameters, and its printed form must have all of its settings. Got "
            f"{text}, which lacks some. Make it a module of the network, and pass its "
            "name."
        )
    return text


def is_module_text(name: str) -> bool:
    """Return whether an element of a part is the text of a module, not a name."""
    return "(" in name


def text_to_module(text: str) -> nn.Module:
    """Return the module of a text; nothing in the text is executed.

    Parameters
    ----------
    text : str
        Printed form of a module of torch. It may come from a file.

    Returns
    -------
    Module
        Without parameters.

    Raises
    ------
    ValueError
        If it is no such text.
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise TypeError("it is not a call")
        if call.func.id not in _MODULES:
            raise TypeError(f"it is none of {', '.join(sorted(_MODULES))}")
        numbers = [each.value for each in ast.walk(call) if type(each) is ast.Constant]
        if any(isinstance(n, int | float) and n > _MAX_ARGUMENT for n in numbers):
            raise TypeError(f"an argument exceeds {_MAX_ARGUMENT}")
        arguments = [ast.literal_eval(value) for value in call.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        module = getattr(nn, call.func.id)(*arguments, **named)
    # A text from a file may be anything, which `ast` and torch refuse in many ways.
    except Exception as error:
        raise ValueError(
            f"A module in `stages` or `head` must be of torch.nn and have no "
            f"parameters. Got {text!r}: {error}."
        ) from error
    assert isinstance(module, nn.Module)
    return module.eval()


def describe_named_parts(
    network: nn.Module,
    stages: Sequence[tuple[str, Sequence[str]]],
    head: Sequence[str],
) -> NetworkStructure:
    """Describe a network by the modules of its stages and of its head.

    Parameters
    ----------
    network : Module
        Any network.
    stages : sequence of (name, names of modules)
        The stages in order.
    head : sequence of str
        Names of the modules of the head.

    Returns
    -------
    NetworkStructure
        Its stages and head consist of the modules of the network.

    Raises
    ------
    ValueError
        If there is no module of a name, or a module is in two parts.
    """
    parts = {name: _part(network, name, modules) for name, modules in stages}
    last = _part(network, "head", head)
    owners: dict[nn.Parameter, str] = {}
    for name, part in [*parts.items(), ("head", last)]:
        for parameter in part.parameters():
            if owners.setdefault(parameter, name) != name:
                raise ValueError(
                    f"Each module of a {type(network).__name__} with parameters must "
                    f"be in one part. Got one that is in {owners[parameter]!r} and in "
                    f"{name!r}. Name it in one of them."
                )
    return NetworkStructure(stages=parts, head=[last])


def _part(network: nn.Module, part: str, names: Sequence[str]) -> nn.Sequential:
    known = dict(network.named_modules())
    modules: list[nn.Module] = []
    for name in names:
        if is_module_text(name):
            modules.append(text_to_module(name))
        elif not name or name not in known:
            close = difflib.get_close_matches(name, known)
            children = ", ".join(each for each, _ in network.named_children())
            raise ValueError(
                f"{part!r} must name modules of a {type(network).__name__}. Got "
                f"{name!r}. "
                + (f"Do you mean {' or '.join(close)}?" if close else "")
                + ("" if close else f"Its modules begin with {children}.")
            )
        elif isinstance(known[name], nn.ModuleList):
            modules.extend(known[name].children())
        else:
            modules.append(known[name])
    return nn.Sequential(*modules)


def _settings(module: nn.Module) -> tuple[type, dict[str, Any]]:
    """Return the type and the arguments of a module."""
    values = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    return type(module), {k: v for k, v in values.items() if k != "training"}
