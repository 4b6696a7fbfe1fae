"""Record what the forward method of a network does, as a list of steps.

The method runs once on symbols in place of tensors. The modules of the network are
single steps, so that what depends on the mode or on values stays in their own methods;
only containers, and modules that are opened on request, are recorded step by step. Each
step runs on tensors without values for images of two sizes, so the shapes are known,
and a method that branches on them is found out.

``torch.fx.symbolic_trace`` replaces methods of all modules of the process meanwhile.
Here only copies of modules are changed, so other threads may use the network.
"""

import copy
import functools
import inspect
import operator
import types
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sktl._backbones.steps import Mode, Ref, Step, contains, map_nested

Forward = Callable[[Any, Any], Any]  # of a network and a tensor; returns a tensor
Values = tuple[Any, Any]  # of a step, for images of two sizes

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MAX_FUNCTIONS = 20  # that have to be single steps


@dataclass(frozen=True)
class Record:
    """What a forward method does.

    Attributes
    ----------
    steps : list of Step
        The first one is the input.
    values : list of tuple
        Result of each step for images of two sizes; tensors are on the meta device.
    output : Ref or other
        What the method returns.
    """

    steps: list[Step]
    values: list[Values]
    output: Any


class MetaNetwork:
    """A copy of a network on the meta device, which runs each step once.

    Parameters
    ----------
    network : Module
        Network, in evaluation mode; it is not changed.

    Attributes
    ----------
    single : set of callable
        Python functions that branch on shapes, and therefore are single steps.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.single: set[Callable[..., Any]] = set()
        self._copy = copy.deepcopy(network, meta_tensors(network))
        self._results: dict[Any, Any] = {}

    def get_submodule(self, path: str) -> nn.Module:
        """Return a module of the copy."""
        return self._copy.get_submodule(path)

    def run(self, step: Step, result: Callable[[int], Any]) -> Any:
        """Run a step as `Step.run` does, unless it ran on the same shapes."""
        if step.kind != "module":
            return self._run(step, result)
        arguments = map_nested(
            lambda a: _shapes(result(a.index)) if isinstance(a, Ref) else a,
            (step.args, step.kwargs or {}),
        )
        key = f"{step.target} {arguments}"
        if key not in self._results:
            self._results[key] = self._run(step, result)
        return self._results[key]

    def _run(self, step: Step, result: Callable[[int], Any]) -> Any:
        # Modules that create tensors create them on the meta device, too.
        with torch.no_grad(), torch.device("meta"):
            return step.run(self._copy, result)


def _shapes(value: Any) -> Any:
    return map_nested(
        lambda v: (v.shape, v.dtype) if isinstance(v, Tensor) else v, value
    )


def record(
    on_meta: MetaNetwork,
    forward: Forward,
    inputs: tuple[Tensor, Tensor],
    opened: Collection[str] = (),
    *,
    training: bool = False,
) -> Record:
    """Record what a function does with the modules of a network.

    Parameters
    ----------
    on_meta : MetaNetwork
        Network.
    forward : callable
        Takes the network and a tensor.
    inputs : (Tensor, Tensor)
        Two inputs of different shapes, on the meta device.
    opened : collection of str
        Names of modules that are recorded step by step, besides the network.
    training : bool, default=False
        Mode of the opened modules.

    Returns
    -------
    Record

    Raises
    ------
    Exception
        Of any type, if the function cannot be recorded.
    """
    single = on_meta.single
    while True:
        recorder = _Recorder(on_meta, inputs, {"", *opened}, training)
        try:
            return recorder.finish(forward(recorder.symbolic, recorder.input))
        except Exception as error:  # reraised unless it is from such a function
            function = _function_that_failed(error, recorder.methods)
            if function is None or function in single or len(single) > _MAX_FUNCTIONS:
                raise
            single.add(function)


def meta_tensors(network: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy` that replaces all tensors by meta tensors."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return memo


class _Symbol:
    """Result of a step of a recorder; operations on it are further steps."""

    def __init__(self, recorder: "_Recorder", index: int) -> None:
        self._recorder, self._index = recorder, index

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> "_Symbol":
        symbols: list[_Symbol] = []
        map_nested(
            lambda a: symbols.append(a) if isinstance(a, _Symbol) else None,
            (args, kwargs or {}),
        )
        recorder = symbols[0]._recorder
        return recorder.call(Step("function", function, tuple(args), kwargs))

    def __getattr__(self, name: str) -> Any:
        first, _ = self._recorder.values[self._index]
        if callable(getattr(first, name)):
            return lambda *args, **kwargs: self._recorder.call(
                Step("method", name, (self, *args), kwargs)
            )
        return self._recorder.call(Step("function", getattr, (self, name)))

    def _constant(self, convert: Callable[[Any], Any]) -> Any:
        """Convert a value, which must be the same for images of both sizes."""
        first, second = map(convert, self._recorder.values[self._index])
        if first != second:
            raise TypeError("its forward method depends on the size of the images")
        return first

    def __bool__(self) -> bool:
        return bool(self._constant(bool))

    def __len__(self) -> int:
        return int(self._constant(len))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __index__(self) -> int:
        return int(self._constant(operator.index))

    def __int__(self) -> int:
        return int(self._constant(int))

    def __float__(self) -> float:
        return float(self._constant(float))

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    # The operators are added below.
    def __getitem__(self, key: Any) -> Any:
        return self._recorder.call(Step("function", operator.getitem, (self, key)))


def _add_operators() -> None:
    def operation(function: Any, *, is_reflected: bool) -> Any:
        def method(self: _Symbol, *others: Any) -> _Symbol:
            args = (*others, self) if is_reflected else (self, *others)
            return self._recorder.call(Step("function", function, args))

        return method

    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and", "or", "xor"),
    ):
        function = getattr(operator, f"__{name}__")
        setattr(_Symbol, f"__{name}__", operation(function, is_reflected=False))
        setattr(_Symbol, f"__r{name}__", operation(function, is_reflected=True))
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "abs"):
        function = getattr(operator, f"__{name}__")
        setattr(_Symbol, f"__{name}__", operation(function, is_reflected=False))


_add_operators()


class _Recorder:
    """Records the steps of one forward pass; see `record`.

    Attributes
    ----------
    input : symbol
        Input of the forward pass.
    symbolic : Module
        Copy of the network that records what it does.
    methods : set of code
        Code of the methods that are recorded step by step.
    steps, values : list
        As in `Record`.
    """

    def __init__(
        self,
        on_meta: MetaNetwork,
        inputs: tuple[Tensor, Tensor],
        opened: set[str],
        training: bool,
    ) -> None:
        self.steps: list[Step] = []
        self.values: list[Values] = []
        self.methods: set[types.CodeType] = set()
        self._on_meta, self._opened, self._training = on_meta, opened, training
        self._copies: dict[int, nn.Module] = {}
        self.input = self._add(Step("input", ""), inputs)
        self.symbolic = self._symbolic(on_meta.network, "")

    def _add(self, step: Step, values: Values) -> _Symbol:
        self.steps.append(step)
        self.values.append(values)
        return _Symbol(self, len(self.steps) - 1)

    def call(self, step: Step) -> _Symbol:
        """Add a step with symbols as arguments, and run it."""
        args, kwargs = map_nested(self._ref, (step.args, step.kwargs or {}))
        step = Step(step.kind, step.target, args, kwargs)
        first = self._on_meta.run(step, lambda i: self.values[i][0])
        second = self._on_meta.run(step, lambda i: self.values[i][1])
        return self._add(step, (first, second))

    def finish(self, output: Any) -> Record:
        return Record(self.steps, self.values, map_nested(self._ref, output))

    @staticmethod
    def _ref(value: Any) -> Any:
        if isinstance(value, Tensor):
            raise TypeError("its forward method uses a constant tensor")
        return Ref(value._index) if isinstance(value, _Symbol) else value

    def _symbolic(self, module: nn.Module, path: str) -> nn.Module:
        """Return a copy of a module that records what it does."""
        if id(module) in self._copies:
            return self._copies[id(module)]
        copied = self._copies[id(module)] = copy.copy(module)
        prefix = f"{path}." if path else ""
        own: dict[str, Any] = copied.__dict__
        # Containers iterate over this dict, in which names may share a module.
        own["_modules"] = {
            name: child and self._symbolic(child, prefix + name)
            for name, child in module._modules.items()
        }
        for members in (module.named_parameters, module.named_buffers):
            for name, _ in members(recurse=False, remove_duplicate=False):
                own[name] = self.call(Step("parameter", prefix + name))
        is_opened = path in self._opened or type(module) in _CONTAINERS
        if is_opened:
            own["training"] = Mode(self._training)
        else:
            own["forward"] = functools.partial(self._module, path, "__call__")
        kind: Any = type(module)
        for name, method in _methods(kind):
            if not is_opened:
                own.setdefault(name, functools.partial(self._method, path, name))
            else:
                self.methods.add(method.__code__)
                if used := self._single_functions(method):
                    own[name] = types.MethodType(_with_globals(method, used), copied)
        return copied

    def _module(self, path: str, method: str, *args: Any, **kwargs: Any) -> _Symbol:
        return self.call(Step("module", (path, method), args, kwargs))

    def _method(self, path: str, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run another method than forward; record it if tensors are involved."""
        if not contains((args, kwargs), _Symbol):
            module = self._on_meta.get_submodule(path)
            result = getattr(module, name)(*args, **kwargs)
            if not contains(result, Tensor):
                return result
        return self._module(path, name, *args, **kwargs)

    def _single_functions(self, method: types.FunctionType) -> dict[str, Any]:
        """Return functions that record what is a single step, by global name."""
        return {
            name: functools.partial(self._function, function)
            for name in method.__code__.co_names
            if isinstance(function := method.__globals__.get(name), types.FunctionType)
            and function in self._on_meta.single
        }

    def _function(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not contains((args, kwargs), _Symbol):
            return function(*args, **kwargs)
        return self.call(Step("function", function, args, kwargs))


@functools.cache
def _methods(kind: Any) -> tuple[tuple[str, types.FunctionType], ...]:
    """Return the methods of a class that are not those of every module."""
    methods = []
    for name in dir(kind):
        method = inspect.getattr_static(kind, name)
        if isinstance(method, types.FunctionType) and not name.startswith("__"):
            if method is not getattr(nn.Module, name, None):
                methods.append((name, method))
    return tuple(methods)


def _with_globals(
    method: types.FunctionType, names: dict[str, Any]
) -> types.FunctionType:
    copied = types.FunctionType(
        method.__code__,
        {**method.__globals__, **names},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copied.__kwdefaults__ = method.__kwdefaults__
    return copied


def _function_that_failed(
    error: Exception, methods: set[types.CodeType]
) -> Callable[..., Any] | None:
    """Return the global function, called by a method, in which an error was raised."""
    trace = error.__traceback__
    caller: types.FrameType | None = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if caller is not None and code not in methods:
            for name in caller.f_code.co_names:
                function = caller.f_globals.get(name)
                if isinstance(function, types.FunctionType):
                    if function.__code__ is code:
                        return function
        caller = trace.tb_frame if code in methods else None
        trace = trace.tb_next
    return None
