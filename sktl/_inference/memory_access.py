"""Which estimators write to their `memory`: all but fitted ones that were loaded.

A model that answers requests would otherwise cache every image that it is asked about,
in a directory that grows, and is created wherever the server runs.
"""

import copy
import hashlib
import os
from multiprocessing import current_process
from typing import Any, Self

from sktl._inference.portable_backbone import PortableBackbone

_LOADED = "_loaded_memory"
_PICKLED_BY = "_pickled_by"


class MemoryAccess(PortableBackbone):
    """Base class of estimators with a `memory`, which is read-only after loading.

    A fitted estimator from a pickle reads its `memory` and does not write to it, until
    `fit` is called or `memory` is set. Copies, and estimators that travel between a
    process and its worker processes, as in a search, are not loaded ones.
    """

    memory: Any

    def set_params(self, **params: Any) -> Self:
        """Set the parameters of this estimator.

        Parameters
        ----------
        **params : dict
            Estimator parameters. Setting `memory` makes a loaded estimator write to it.

        Returns
        -------
        self : object
            The estimator.
        """
        super().set_params(**params)
        if "memory" in params:
            self._make_memory_writable()
        return self

    def _is_memory_read_only(self) -> bool:
        """Return whether rows may be read, but not written."""
        # Another object was assigned, if it is not the same.
        return _LOADED in vars(self) and vars(self)[_LOADED] is self.memory

    def _make_memory_writable(self) -> None:
        self.__dict__.pop(_LOADED, None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state; if fitted, with the process that it is from."""
        state = dict(super().__getstate__())
        if self.memory is not None and _is_fitted(state):
            state[_PICKLED_BY] = _session(), os.getpid()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state; a fitted estimator becomes a loaded one."""
        state = dict(state)
        session, process = state.pop(_PICKLED_BY, (None, None))
        super().__setstate__(state)
        is_sent = session == _session() and process != os.getpid()
        if self.memory is not None and _is_fitted(state) and not is_sent:
            self.__dict__[_LOADED] = self.memory

    def __copy__(self) -> Self:
        """Return a shallow copy, which is not a loaded estimator unless this one is."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self._state_of_a_copy())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a deep copy, which is not a loaded estimator unless this one is."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self._state_of_a_copy(), memo))
        return copied

    def _state_of_a_copy(self) -> dict[str, Any]:
        state = self.__getstate__()
        state.pop(_PICKLED_BY, None)
        return state


def _is_fitted(state: dict[str, Any]) -> bool:
    return any(name.endswith("_") and not name.startswith("_") for name in state)


def _session() -> str:
    """Return an id that a process shares with the worker processes that it starts."""
    # A random key that multiprocessing and joblib's loky pass on; only its hash leaves
    # the process.
    return hashlib.sha256(bytes(current_process().authkey)).hexdigest()[:16]
