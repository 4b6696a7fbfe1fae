"""Cut a recorded forward method into blocks that pass one tensor each.

A record is cut wherever a single tensor carries all that the later steps need of the
image. What depends on shapes only, such as the sides of a map or rotary embeddings, is
computed again in each block, from the shape of its input.
"""

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sktl._backbones.steps import Ref, Step, contains, map_nested
from sktl._backbones.traced import Record, Values

_MAX_PREFIX = 16  # class and register tokens


class TracedBlock(nn.Module):
    """Steps between two cuts of a network, with the modules and parameters they use.

    Parameters
    ----------
    network : Module
        Network whose modules and parameters are used; they are not copied.
    steps : sequence of Step
        The last one is the output. Names are those in `network`; ``Ref(0)`` is the
        input and ``Ref(i)`` the result of step i, counted from 1.
    saved : collection of str
        Names in the state dict of `network`; its other buffers are not saved.
    """

    def __init__(
        self, network: nn.Module, steps: Sequence[Step], saved: Collection[str]
    ) -> None:
        super().__init__()
        self.training = network.training  # a new module would be in training mode
        self.steps: tuple[Step, ...] = ()  # no module may have the names of these two
        self._released: tuple[tuple[int, ...], ...] = ()
        self.steps = tuple(self._own(network, step, saved) for step in steps)
        uses = [sorted(set(step.refs())) for step in self.steps]
        last_uses = {result: i for i, used in enumerate(uses) for result in used}
        # For each step, the results that no later one uses.
        self._released = tuple(
            tuple(result for result in used if last_uses[result] == i)
            for i, used in enumerate(uses)
        )

    def _own(self, network: nn.Module, step: Step, saved: Collection[str]) -> Step:
        """Register what a step uses; return the step with its name in this block."""
        if step.kind == "module":
            path, method = step.target
            module = network.get_submodule(path)
            name = self._free_name(path, module)
            self.add_module(name, module)
            return Step("module", (name, method), step.args, step.kwargs)
        if step.kind == "parameter":
            value = operator.attrgetter(step.target)(network)
            name = self._free_name(step.target, value)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=step.target in saved)
            return Step("parameter", name)
        return step

    def _free_name(self, path: str, value: Any) -> str:
        """Return a name for a module or a tensor, which it may have already."""
        name = path.replace(".", "_")
        while getattr(self, name, value) is not value:
            name += "_"
        return name

    def forward(self, x: Tensor) -> Any:
        """Run the steps."""
        results: list[Any] = [x]
        for index, step in enumerate(self.steps):
            results.append(step.run(self, results.__getitem__))
            for released in self._released[index]:
                results[released] = None  # its memory is needed for later ones
        return results[-1]

    def extra_repr(self) -> str:
        """Return the steps, which are part of the definition of the network."""
        return "\n".join(_text(step) for step in self.steps)


@dataclass(frozen=True)
class Block:
    """A block of a network.

    Attributes
    ----------
    module : Module
        Module of the network where the block is the call of one, or a `TracedBlock`.
    layout : {"NCHW", "NHWC", "NLC", "NC"}
        Axes of the output: maps, tokens, or one vector per image.
    n_prefix : int
        Number of tokens before those of the positions, in tokens.
    outputs : (Tensor, Tensor)
        Outputs for images of two sizes, on the meta device.
    """

    module: nn.Module
    layout: str
    n_prefix: int
    outputs: tuple[Tensor, Tensor]


def cut(network: nn.Module, record: Record) -> list[Block]:
    """Cut a record into blocks.

    Parameters
    ----------
    network : Module
        Network that the record is of.
    record : Record
        Of a method that takes and returns one tensor.

    Returns
    -------
    list of Block
        As many as possible; run in order, they are equivalent to the method.

    Raises
    ------
    TypeError
        If the method does not return a tensor.
    """
    return _Cutter(network, record).blocks()


def layout_of(outputs: Values, batches: tuple[int, int]) -> tuple[str, int] | None:
    """Return the layout of a tensor and its number of prefix tokens.

    Parameters
    ----------
    outputs : (Tensor, Tensor)
        The tensor for images of two sizes.
    batches : (int, int)
        Numbers of images.

    Returns
    -------
    (str, int) or None
        As in `Block`; None for anything else.
    """
    if not all(isinstance(value, Tensor) for value in outputs):
        return None
    first, second = (tuple(value.shape) for value in outputs)
    if (first[:1], second[:1]) != (batches[:1], batches[1:]):
        return None
    if len(first) != len(second) or not outputs[0].is_floating_point():
        return None
    if len(first) == 2:
        return "NC", 0
    if len(first) == 3 and first[2] == second[2]:
        n_prefix = _n_prefix(first[1], second[1])
        return None if n_prefix is None else ("NLC", n_prefix)
    if len(first) == 4:
        # Rows and columns grow with the image, channels do not.
        for layout, channel, row in (("NCHW", 1, 2), ("NHWC", 3, 1)):
            is_square = all(s[row] == s[row + 1] for s in (first, second))
            if is_square and first[channel] == second[channel]:
                return layout, 0
    return None


def token_side(x: Tensor, n_prefix: int) -> int:
    """Return the side of the square map whose positions are the tokens ``(n, l, c)``.

    Parameters
    ----------
    x : Tensor of shape (n, n_prefix + side * side, c)
        Tokens.
    n_prefix : int
        Number of tokens before those of the positions.
    """
    return math.isqrt(x.shape[1] - n_prefix)


def _n_prefix(first: int, second: int) -> int | None:
    """Return the number of tokens that are no positions of a square map."""
    for n_prefix in range(min(first, _MAX_PREFIX + 1)):
        counts = (first - n_prefix, second - n_prefix)
        if all(math.isqrt(count) ** 2 == count for count in counts):
            return n_prefix
    return None


class _CannotCut(Exception):
    pass


class _Cutter:
    """Cuts a record; see `cut`.

    Attributes
    ----------
    kinds : list of str
        For each step: ``"constant"``; ``"shape"``, if its result depends only on the
        shape of the input; ``"value"``, if it depends on its values.
    saved : frozenset of str
        Names in the state dict of the network.
    """

    def __init__(self, network: nn.Module, record: Record) -> None:
        if not isinstance(record.output, Ref):
            raise TypeError("its forward method does not return one tensor")
        self.network, self.record, self.end = network, record, record.output.index
        self.saved = frozenset(network.state_dict())
        self.uses = [step.refs() for step in record.steps]
        self.kinds: list[str] = []
        for step, values, uses in zip(
            record.steps, record.values, self.uses, strict=True
        ):
            kinds = {self.kinds[index] for index in uses}
            if step.kind == "input" or ("value" in kinds and contains(values, Tensor)):
                self.kinds.append("value")
            else:
                self.kinds.append("shape" if kinds - {"constant"} else "constant")
        # The last step that uses each result; steps that are not needed use nothing.
        self.last_use = [0] * len(self.uses)
        self.last_use[self.end] = len(self.uses)
        for index in range(self.end, 0, -1):
            if self.last_use[index]:
                for used in self.uses[index]:
                    self.last_use[used] = max(self.last_use[used], index)

    def blocks(self) -> list[Block]:
        """Return the blocks."""
        blocks: list[Block] = []
        start = _Start(0, 0, "NCHW", 0)
        live = {0}
        for index in range(1, self.end + 1):
            if self.kinds[index] != "constant":
                live.add(index)
            live = {i for i in live if self.last_use[i] > index}
            end = self._start_after(index, live)
            if end is not None and end.tensor != start.tensor:
                segment = _Segment(self, start)
                segment.use(end.tensor)
                values = self.record.values[end.tensor]
                module = segment.module()
                blocks.append(Block(module, end.layout, end.n_prefix, values))
                start = end
        return blocks

    def _start_after(self, index: int, live: set[int]) -> "_Start | None":
        """Return where a block can start, if it can after that step."""
        values = [i for i in live if self.kinds[i] == "value"]
        if len(values) != 1:
            return None
        (tensor,) = values
        layout = self.layout(tensor)
        if layout is None or (layout[0] == "NC" and tensor != self.end):
            return None
        start = _Start(index, tensor, *layout)
        segment = _Segment(self, start)
        try:
            for each in live - {tensor}:
                segment.use(each)
        except _CannotCut:
            return None
        return start

    def layout(self, index: int) -> tuple[str, int] | None:
        """Return layout and number of prefix tokens of a result."""
        first, second = self.record.values[0]
        return layout_of(self.record.values[index], (len(first), len(second)))


@dataclass(frozen=True)
class _Start:
    """Where a block starts: after which step, with which tensor."""

    index: int
    tensor: int
    layout: str
    n_prefix: int


class _Segment:
    """Collects the steps of one block."""

    def __init__(self, cutter: _Cutter, start: _Start) -> None:
        self._cutter, self._start = cutter, start
        self._steps: list[Step] = []
        self._known: dict[int, Any] = {start.tensor: Ref(0)}

    def module(self) -> nn.Module:
        """Return the block whose output is the last step."""
        network = self._cutter.network
        if len(self._steps) == 1:
            (step,) = self._steps
            is_call = step.kind == "module" and step.target[1] == "__call__"
            if is_call and step.args == (Ref(0),) and not step.kwargs:
                return network.get_submodule(step.target[0])
        return TracedBlock(network, self._steps, self._cutter.saved)

    def use(self, index: int) -> Any:
        """Add what is needed for a result of the record; return its reference."""
        # Not recursive, since records are long.
        pending = [index]
        while pending:
            last = pending[-1]
            if last not in self._known:
                self._from_shape(last)
            needs = [i for i in self._cutter.uses[last] if i not in self._known]
            if last not in self._known and not needs:
                self._known[last] = self._add(self._cutter.record.steps[last])
            if last in self._known:
                pending.pop()
            else:
                pending.extend(needs)
        return self._known[index]

    def _from_shape(self, index: int) -> None:
        """Add a value from before the start, if the input of the block has it."""
        kind = self._cutter.kinds[index]
        if index > self._start.index or kind == "constant":
            return
        if kind == "value":
            raise _CannotCut
        values = self._cutter.record.values[index]
        if not contains(values, Tensor):
            try:
                self._known[index] = self._expression(*values)
            except _CannotCut:
                if not self._cutter.uses[index]:
                    raise

    def _expression(self, first: Any, second: Any) -> Any:
        """Return a value that depends on the shape of the input of the block."""
        if isinstance(first, tuple | list):
            pairs = zip(first, second, strict=True)
            return tuple(self._expression(*pair) for pair in pairs)
        if isinstance(first, torch.device | torch.dtype):
            name = "device" if isinstance(first, torch.device) else "dtype"
            return self._step(getattr, Ref(0), name)
        if type(first) is type(second) and first == second:
            return first
        shapes = [x.shape for x in self._cutter.record.values[self._start.tensor]]
        for axis, sides in enumerate(zip(*shapes, strict=True)):
            if sides == (first, second):
                shape = self._step(getattr, Ref(0), "shape")
                return self._step(operator.getitem, shape, axis)
        if len(shapes[0]) == 3:
            n_prefix = self._start.n_prefix
            if all(
                value == math.isqrt(shape[1] - n_prefix)
                for value, shape in zip((first, second), shapes, strict=True)
            ):
                return self._step(token_side, Ref(0), n_prefix)
        raise _CannotCut

    def _add(self, step: Step) -> Ref:
        args, kwargs = map_nested(
            lambda a: self._known[a.index] if isinstance(a, Ref) else a,
            (step.args, step.kwargs or {}),
        )
        self._steps.append(Step(step.kind, step.target, args, kwargs))
        return Ref(len(self._steps))

    def _step(self, function: Any, *args: Any) -> Ref:
        self._steps.append(Step("function", function, args))
        return Ref(len(self._steps))


def _text(step: Step) -> str:
    """Return a step as text, which is the same in every process."""

    def text(value: Any) -> str:
        if isinstance(value, Ref):
            return f"%{value.index}"
        if isinstance(value, tuple | list):
            return f"({', '.join(text(each) for each in value)})"
        if isinstance(value, slice):
            return f"{text(value.start)}:{text(value.stop)}:{text(value.step)}"
        if callable(value):  # whose repr may have an address
            return str(getattr(value, "__qualname__", type(value).__qualname__))
        return repr(value)

    target = step.target
    if step.kind == "function":
        target = getattr(target, "__name__", type(target).__name__)
    elif step.kind == "module":
        target = ".".join(target)
    given = [text(each) for each in step.args]
    given += [f"{name}={text(value)}" for name, value in (step.kwargs or {}).items()]
    return f"{step.kind} {target}({', '.join(given)})"
