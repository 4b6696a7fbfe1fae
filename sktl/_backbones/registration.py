"""What `register_backbone` records, in a form that other processes understand.

A process that unpickles a registration imports the builder by its reference, such as
``"my_module:build"``, when the network is built.
"""

import copyreg
import hashlib
import importlib
import inspect
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import CodeType
from typing import Any

from torch import nn

from sktl._images.preprocessing import Preprocessing

Builder = Callable[[], nn.Module]

# Modules of a script or a notebook, which another process does not import.
_MAIN = {"__main__", "__mp_main__"}

# Modules of joblib that pickle arguments to hash them and results to cache them, and
# the one that writes files. No function of a user is called from the first two.
_CACHE = {"joblib.hashing", "joblib._store_backends"}
_FILE = "joblib.numpy_pickle"


@dataclass(frozen=True)
class ImportedBuilder:
    """A builder that is imported when it is called.

    Attributes
    ----------
    reference : str
        Module and name of a function or class, such as ``"my_module:build"``.
    """

    reference: str

    def __call__(self) -> nn.Module:
        """Build the network.

        Raises
        ------
        ImportError
            If there is no such module, or no such name in it.
        TypeError
            If it is not callable.
        """
        module, _, name = self.reference.partition(":")
        try:
            builder = attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"The builder {self.reference!r} of a registered backbone must be "
                f"importable. Got: {error}. Add the folder of the module to the "
                "PYTHONPATH of this process."
            ) from error
        if not callable(builder):
            raise TypeError(
                f"The builder {self.reference!r} of a registered backbone must be "
                f"callable. Got {type(builder).__name__}."
            )
        network: nn.Module = builder()
        return network


class LocalBuilder(type):
    """Type of the classes that stand for a builder without a reference.

    A lambda or a function of a script can be called in this process only, so pickle
    refuses such a class, except for caches of joblib. cloudpickle, with which joblib,
    Dask and Ray send tasks to their workers, pickles classes of any type by value, and
    unpickles the same one to the same object: the workers get the function.
    """

    builder: Builder

    def __call__(cls) -> nn.Module:
        """Build the network."""
        return cls.builder()


@dataclass(frozen=True)
class UnavailableBuilder:
    """What a cache of joblib has in place of a builder without a reference.

    Attributes
    ----------
    reason : str
        Why there is no reference.
    code : str
        Digest of the code, so that joblib caches the results of each code.
    """

    reason: str
    code: str = field(default="", repr=False)

    def __call__(self) -> nn.Module:
        """Raise a TypeError."""
        raise TypeError(self.reason)


def pickled_for() -> str:
    """Return the purpose of the pickle that is written, from the stack of calls.

    pickle does not pass it to the objects.

    Returns
    -------
    {"cache", "file", "process"}
        For a hash or a cache of joblib; for a file of joblib; or for anything else,
        such as a task of a worker process.
    """
    modules: set[object] = set()
    frame = inspect.currentframe()
    while frame is not None:
        modules.add(frame.f_globals.get("__name__"))
        frame = frame.f_back
    if not modules.isdisjoint(_CACHE):
        return "cache"
    return "file" if _FILE in modules else "process"


def _reduce(builder: LocalBuilder) -> tuple[Any, tuple[str, str]]:
    reason = _not_importable(builder)
    # `Pipeline(memory=...)` hashes and stores estimators. The same session reads them,
    # or a later one that runs the same code.
    if pickled_for() != "cache":
        raise pickle.PicklingError(reason)
    return UnavailableBuilder, (reason, _code_digest(builder.builder))


copyreg.pickle(LocalBuilder, _reduce)


def _code_digest(function: Any) -> str:
    """Return a digest of what a function executes, wherever it is defined."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [*cells, *(function.__defaults__ or ())]
    plain = [repr(v) for v in values if isinstance(v, bool | int | float | str | None)]
    return hashlib.sha256(repr([_instructions(code), plain]).encode()).hexdigest()


def _instructions(code: CodeType) -> list[Any]:
    """Return instructions, names and constants, without the lines of the source."""
    constants = [
        _instructions(each) if isinstance(each, CodeType) else repr(each)
        for each in code.co_consts
    ]
    return [code.co_code, code.co_names, constants]


def _not_importable(builder: LocalBuilder) -> str:
    function = builder.builder
    origin = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__name__)
    return (
        f"The builder of the backbone {builder.__name__!r} must be a function or class "
        "that other processes can import, to be pickled or saved. Got "
        f"{f'{origin}:{name}' if origin else name}. Define it at the top level of a "
        "module, import it from there, call register_backbone again, and then pickle "
        "or save."
    )


@dataclass(frozen=True)
class Registration:
    """Arguments of `register_backbone`.

    Attributes
    ----------
    name, preprocessing, categories, layout, n_prefix_tokens
        As in `register_backbone`, with `categories` as a tuple.
    builder : ImportedBuilder, LocalBuilder or UnavailableBuilder
        See `portable_builder`.
    stages : tuple of (name, names of modules), or None
        The stages in order.
    head : tuple of str
        Names of the modules of the head. In `stages` and `head`, a name with
        parentheses is the text of a module, see `sktl._backbones.named_modules`.
    is_restored : bool
        Whether it comes from a pickle or a saved file, not from `register_backbone`.
    """

    name: str
    builder: Builder
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None = None
    layout: str | None = None
    n_prefix_tokens: int = 0
    stages: tuple[tuple[str, tuple[str, ...]], ...] | None = None
    head: tuple[str, ...] = ()
    is_restored: bool = field(default=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the same state in a process that restored the registration."""
        return {**vars(self), "is_restored": False}

    @property
    def reference(self) -> str:
        """The reference of the builder.

        Raises
        ------
        TypeError
            If it has none.
        """
        if isinstance(self.builder, LocalBuilder):
            raise TypeError(_not_importable(self.builder))
        if isinstance(self.builder, UnavailableBuilder):
            raise TypeError(self.builder.reason)
        assert isinstance(self.builder, ImportedBuilder)
        return self.builder.reference

    @property
    def is_importable(self) -> bool:
        """Whether the builder has a reference."""
        return isinstance(self.builder, ImportedBuilder)

    def differences(self, other: "Registration") -> list[str]:
        """Return the names of the arguments with other values."""
        return [
            each.name
            for each in fields(self)
            if each.compare and getattr(self, each.name) != getattr(other, each.name)
        ]


def portable_builder(name: str, builder: Callable[[], Any]) -> Builder:
    """Return a builder that can be pickled as far as possible.

    Parameters
    ----------
    name : str
        Name of the backbone, for the error message.
    builder : callable
        Argument of `register_backbone`.

    Returns
    -------
    ImportedBuilder or LocalBuilder
        The first if importing the name of the function from its module gives this
        function.
    """
    module = getattr(builder, "__module__", None)
    qualname = getattr(builder, "__qualname__", "")
    if isinstance(module, str) and module not in _MAIN:
        try:
            found = attrgetter(qualname)(sys.modules.get(module))
        except AttributeError:
            found = None
        if found is builder:
            return ImportedBuilder(f"{module}:{qualname}")
    return LocalBuilder(name, (), {"builder": staticmethod(builder)})
