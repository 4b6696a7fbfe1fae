"""Whether a pickle makes nothing but a state dict, told without reading it.

torch's restricted unpickler executes no code of a file. But among what it calls are
functions that take all the memory there is, for a file of a few bytes, and of a tuple
in a tuple, a hundred thousand times, it asks the hash, which ends the process. So here
a pickle is gone through before, opcode by opcode, and nothing is made.
"""

import pickletools
from pickle import UnpicklingError
from typing import IO, Any

# What may be called to make a state dict, or what training scripts put beside it.
_CALLABLE = {
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch Size",
    "torch device",
    "collections OrderedDict",
    "collections Counter",
    "__builtin__ set",
    "builtins set",
    "__builtin__ complex",
    "builtins complex",
}
_DEEPEST = 100  # tuple in a tuple
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
# Those of protocol 2 that torch reads. A NEWOBJ is refused, by the name of its class.
_OPCODES = {
    *_TUPLES,
    *("GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "MARK", "STOP", "PROTO", "BINPERSID"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}
# What is on the stack: the name of a global, or how deep a tuple is.
_Item = str | int
_ORDERED_DICT = "an OrderedDict"


def scan_pickle(code: bytes | IO[bytes]) -> None:
    """Refuse a pickle that does what no state dict needs.

    Parameters
    ----------
    code : bytes or binary file
        Of a file all up to the end of the pickle is read.

    Raises
    ------
    pickle.UnpicklingError
        If it does. The text has the words "GLOBAL module.name" if it is a call.
    Exception
        Of any other kind, if it is no pickle.
    """
    stack: list[_Item] = []
    marks: list[int] = []
    memo: dict[Any, _Item] = {}
    for opcode, argument, _ in pickletools.genops(code):
        name = opcode.name
        if name not in _OPCODES:
            raise UnpicklingError(f"{name} is not an opcode of a state dict")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken = _taken(stack, marks, opcode.stack_before)
            if opcode.stack_after:
                stack.append(_made(name, argument, taken))


def _taken(stack: list[_Item], marks: list[int], before: list[Any]) -> list[_Item]:
    """Take from the stack what an opcode takes."""
    n = len(before)
    if pickletools.markobject in before:
        n = before.index(pickletools.markobject) + len(stack) - marks.pop()
    if n > len(stack) - (marks[-1] if marks else 0):
        raise UnpicklingError("it takes more than there is")
    start = len(stack) - n
    taken = stack[start:]
    del stack[start:]
    return taken


def _made(name: str, argument: Any, taken: list[_Item]) -> _Item:
    """Say what an opcode puts onto the stack, if it may."""
    if name == "GLOBAL":
        return str(argument)
    if name in ("REDUCE", "NEWOBJ"):
        if name == "NEWOBJ" or taken[0] not in _CALLABLE:
            called = str(taken[0]).replace(" ", ".")
            raise UnpicklingError(f"a call of GLOBAL {called}")
        if taken[0] == "collections OrderedDict":
            return _ORDERED_DICT
    if name in ("BUILD", "SETITEM", "SETITEMS"):
        if name == "BUILD" and taken[0] != _ORDERED_DICT:
            raise UnpicklingError("it sets the state of what is no OrderedDict")
        return taken[0]
    if name not in _TUPLES and name != "REDUCE":
        return 0  # nothing in it is asked for its hash
    deepest = 1 + max((item for item in taken if isinstance(item, int)), default=0)
    if deepest > _DEEPEST:
        raise UnpicklingError(f"it has tuples in tuples, more than {_DEEPEST} times")
    return deepest
