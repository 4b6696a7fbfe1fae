"""Scan a pickle before it is read: it may create only a state dict.

torch's restricted unpickler executes no code from a file. But some functions that it
allows can allocate all memory for a file of a few bytes, and the hash of tuples that
are nested a hundred thousand times crashes the process. So the opcodes of a pickle are
scanned first, without creating any object.
"""

import pickletools
from pickle import UnpicklingError
from typing import IO, Any

# Callables of a state dict, and of other values that training scripts save with it.
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
_MAX_DEPTH = 100  # of nested tuples
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
# Opcodes of protocol 2 that torch supports. NEWOBJ is rejected with its class name.
_OPCODES = {
    *_TUPLES,
    *("GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "MARK", "STOP", "PROTO", "BINPERSID"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}
# Item of the stack: the name of a global, or the depth of a tuple.
_Item = str | int
_ORDERED_DICT = "an OrderedDict"


def scan_pickle(code: bytes | IO[bytes]) -> None:
    """Raise if a pickle has operations that no state dict needs.

    Parameters
    ----------
    code : bytes or binary file
        A file is read up to the end of the pickle.

    Raises
    ------
    pickle.UnpicklingError
        If it has such operations. For a call, the message contains the words
        "GLOBAL module.name".
    Exception
        Of any other type, if it is not a valid pickle.
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
    """Pop the arguments of an opcode from the stack."""
    n = len(before)
    if pickletools.markobject in before:
        n = before.index(pickletools.markobject) + len(stack) - marks.pop()
    if n > len(stack) - (marks[-1] if marks else 0):
        raise UnpicklingError("an opcode takes more than the stack holds")
    start = len(stack) - n
    taken = stack[start:]
    del stack[start:]
    return taken


def _made(name: str, argument: Any, taken: list[_Item]) -> _Item:
    """Return the result of an opcode; raise if the opcode is not allowed."""
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
            raise UnpicklingError(
                "it sets the state of an object other than an OrderedDict"
            )
        return taken[0]
    if name not in _TUPLES and name != "REDUCE":
        return 0  # its hash is not computed
    deepest = 1 + max((item for item in taken if isinstance(item, int)), default=0)
    if deepest > _MAX_DEPTH:
        raise UnpicklingError(f"it has tuples nested more than {_MAX_DEPTH} times")
    return deepest
