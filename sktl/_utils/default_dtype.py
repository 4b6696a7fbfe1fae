"""float32 as the default data type of one thread, whatever the default of the process.

``torch.set_default_dtype`` belongs to the user and applies to all threads, so it is
neither obeyed nor changed here: random values of another data type are other values,
and layers of different data types cannot be combined.
"""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that create tensors of the default data type.
_FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.eye, torch.empty_strided),
    *(torch.rand, torch.randn, torch.linspace, torch.logspace),
}
# These use the default data type only for a float among their arguments.
_FACTORIES_OF_FLOATS = {torch.full, torch.arange}
_FROM_DATA = {torch.tensor, torch.as_tensor}
# The caller chooses the data type of the result, maybe as a positional argument.
_CONVERSIONS = {Tensor.double, Tensor.to, Tensor.type, Tensor.type_as, Tensor.view}


class float32_default(TorchFunctionMode):
    """Create tensors as float32 where torch would use the default data type.

    Applies to functions of torch that this thread calls inside the context and that
    get no data type. Legacy constructors such as ``torch.Tensor(3)`` are not covered.

    Attributes
    ----------
    was_needed : bool
        Whether torch would have created a tensor of another data type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.was_needed = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` with float32 as the default data type."""
        kwargs = kwargs or {}
        default = torch.get_default_dtype()
        if default == torch.float32 or kwargs.get("dtype") is not None:
            return func(*args, **kwargs)
        values = [*args, *kwargs.values()]
        if func in _FACTORIES or (
            func in _FACTORIES_OF_FLOATS and any(type(v) is float for v in values)
        ):
            self.was_needed = True
            return func(*args, **{**kwargs, "dtype": torch.float32})
        out = func(*args, **kwargs)
        is_default = isinstance(out, Tensor) and out.dtype == default
        if is_default and _has_default_dtype(func, values):
            self.was_needed = True
            return out.to(torch.float32)
        return out


def float32_default_if_needed() -> AbstractContextManager[object]:
    """Return `float32_default`, or an empty context if the default is float32.

    For code that calls many functions: the context costs microseconds for each.
    """
    if torch.get_default_dtype() == torch.float32:
        return contextlib.nullcontext()
    return float32_default()


def _has_default_dtype(func: Callable[..., Any], values: list[Any]) -> bool:
    """Return whether a result has the default data type because nothing decides it."""
    if func in _FROM_DATA:
        value = values[0]
        while isinstance(value, list | tuple) and value:
            value = value[0]
        # Scalars of NumPy have their own data type.
        return type(value) in (float, list, tuple)
    tensors = [value for value in values if isinstance(value, Tensor)]
    # A function of integers, such as a division.
    return (
        bool(tensors)
        and func not in _CONVERSIONS
        and not any(t.is_floating_point() or t.is_complex() for t in tensors)
    )
