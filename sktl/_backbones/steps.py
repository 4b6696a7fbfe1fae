"""Steps of a recorded forward method."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Ref:
    """Result of an earlier step; 0 is the input."""

    index: int


@dataclass(frozen=True, repr=False)
class Mode:
    """The attribute ``training`` of a module, as an argument of a step.

    Attributes
    ----------
    is_training : bool
        Its value while the step is recorded. When the step runs, the argument is the
        mode of the module that runs it.
    """

    is_training: bool

    def __bool__(self) -> bool:
        return self.is_training

    def __repr__(self) -> str:
        return "self.training"


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes
    ----------
    kind : {"parameter", "module", "method", "function"}
        What `target` is: the name of a parameter or buffer, the name of a module and
        that of its method, the name of a method of the first argument, or a function.
    target : str, tuple of str or callable
        Name or function.
    args, kwargs : tuple, dict
        Arguments, in which a `Ref` stands for a result and a `Mode` for the mode.
    """

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def run(self, module: nn.Module, result: Callable[[int], Any]) -> Any:
        """Run the step.

        Parameters
        ----------
        module : Module
            Owner of the parameters and modules, whose mode is that of the step.
        result : callable
            Takes the index of an earlier step, returns its result.
        """
        if self.kind == "parameter":
            return operator.attrgetter(self.target)(module)

        def value(argument: Any) -> Any:
            if isinstance(argument, Ref):
                return result(argument.index)
            return module.training if isinstance(argument, Mode) else argument

        args, kwargs = map_nested(value, (self.args, self.kwargs or {}))
        if self.kind == "module":
            name, method = self.target
            return getattr(module.get_submodule(name), method)(*args, **kwargs)
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def refs(self) -> list[int]:
        """Return the indices of the results that the step uses."""
        found: list[int] = []

        def note(value: Any) -> Any:
            if isinstance(value, Ref):
                found.append(value.index)
            return value

        map_nested(note, (self.args, self.kwargs or {}))
        return found


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all values in nested tuples, lists, dicts and slices."""
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        mapped = [map_nested(function, each) for each in value]
        return mapped if isinstance(value, list) else tuple(mapped)
    if isinstance(value, dict):
        return {key: map_nested(function, each) for key, each in value.items()}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return slice(*(map_nested(function, part) for part in parts))
    return function(value)


def contains(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Return whether there is a value of a type in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(contains(each, kind) for each in value)
    return isinstance(value, kind)
