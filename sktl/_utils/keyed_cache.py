"""Thread-safe cache of the last used values, with one lock per key."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock, RLock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class KeyedCache(Generic[Key, Value]):
    """Cache the last used values; create each value once, whatever the threads do.

    A thread waits only for a value with its own key: creating the value of one key
    does not delay any other key. The lock of a key is reentrant.

    Parameters
    ----------
    max_size : int
        Maximum number of cached values; the least recently used is dropped first.
        With 0 nothing is cached, but threads that request the same key at the same
        time still share one value.

    Attributes
    ----------
    max_size : int
        As given. A change takes effect when the next value is created.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._lock = Lock()  # held for dict operations only, never in `create`
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._pending: dict[Key, _Pending[Value]] = {}

    def __len__(self) -> int:
        """Return the number of cached values."""
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """Return the value of a key, or None if it is not cached."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def keys(self) -> list[Key]:
        """Return the cached keys, the least recently used first."""
        with self._lock:
            return list(self._values)

    def get_or_create(self, key: Key, create: Callable[[], Value]) -> Value:
        """Return the value of a key; create it if it is not cached.

        Parameters
        ----------
        key : hashable
            Key of the value.
        create : callable
            Called without arguments if the value is not cached. If it raises, the
            next thread that waits for the key tries again.

        Returns
        -------
        object
            The cached or created value.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            pending = self._pending.setdefault(key, _Pending())
            pending.n_threads += 1
        try:
            with pending.lock:
                # Not looked up in the cache: other keys may have evicted it by now.
                if not pending.values:
                    value = create()
                    if not pending.values:  # `create` may have requested this key
                        self._store(key, value, pending)
                return pending.values[0]
        finally:
            with self._lock:
                pending.n_threads -= 1
                if pending.n_threads == 0 and self._pending.get(key) is pending:
                    del self._pending[key]

    def drop(self, predicate: Callable[[Key], bool]) -> None:
        """Drop the values of some keys.

        Parameters
        ----------
        predicate : callable
            Called with each key; True to drop its value. A value that is being created
            is returned to the threads that wait for it, but not cached.
        """
        with self._lock:
            for key in filter(predicate, list(self._values)):
                del self._values[key]
            for key in filter(predicate, list(self._pending)):
                del self._pending[key]

    def clear(self) -> None:
        """Drop all values."""
        self.drop(lambda key: True)

    def _store(self, key: Key, value: Value, pending: "_Pending[Value]") -> None:
        pending.values.append(value)
        with self._lock:
            if self._pending.get(key) is pending:  # else dropped in the meantime
                self._values[key] = value
                self._values.move_to_end(key)
                while len(self._values) > self.max_size:
                    self._values.popitem(last=False)


class _Pending(Generic[Value]):
    """A value that is being created, for the threads that wait for it."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.n_threads = 0
        self.values: list[Value] = []  # empty until it is created
