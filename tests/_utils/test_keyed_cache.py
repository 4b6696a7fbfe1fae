"""Tests of sktl._utils.keyed_cache."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sktl._utils.keyed_cache import KeyedCache

TIMEOUT = 30  # seconds; only a deadlock takes that long


def never():
    raise AssertionError("the value is cached")


def test_creates_a_value_once():
    cache = KeyedCache(2)
    value = object()
    assert cache.get_or_create("a", lambda: value) is value
    assert cache.get_or_create("a", never) is value


def test_drops_the_least_recently_used():
    cache = KeyedCache(2)
    for key in ("a", "b"):
        cache.get_or_create(key, key.upper)
    assert cache.get_or_create("a", never) == "A"
    cache.get_or_create("c", "c".upper)
    assert cache.keys() == ["a", "c"]
    assert len(cache) == 2
    assert cache.get_or_create("b", lambda: "new") == "new"


def test_a_key_does_not_wait_for_another_key():
    cache = KeyedCache(2)
    started, finish = threading.Event(), threading.Event()

    def create_slowly():
        started.set()
        assert finish.wait(TIMEOUT)
        return "slow"

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.get_or_create, "slow", create_slowly)
        assert started.wait(TIMEOUT)
        assert cache.get_or_create("quick", lambda: 1) == 1  # while the other waits
        assert not slow.done()
        finish.set()
        assert slow.result(TIMEOUT) == "slow"


@pytest.mark.parametrize("max_size", [0, 2])
def test_threads_with_one_key_share_one_value(max_size):
    cache = KeyedCache(max_size)
    together, created = threading.Barrier(8), []

    def create():
        created.append(1)
        threading.Event().wait(0.2)  # longer than the other threads need to arrive
        return object()

    def request(_):
        together.wait(TIMEOUT)
        return cache.get_or_create("a", create)

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(request, range(8)))
    assert len(created) == len(set(map(id, values))) == 1
    assert len(cache) == min(max_size, 1)


def test_a_failure_is_not_cached():
    cache = KeyedCache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_create("a", lambda: 1 // 0)
    assert cache.get_or_create("a", lambda: 3) == 3


def test_drops_by_predicate_and_clears():
    cache = KeyedCache(3)
    for key in ("ab", "ac", "bc"):
        cache.get_or_create(key, key.upper)
    cache.drop(lambda key: key.startswith("a"))
    assert cache.keys() == ["bc"]
    cache.clear()
    assert cache.keys() == []


def test_a_value_dropped_while_it_is_created_is_not_cached():
    cache = KeyedCache(2)

    def create():
        cache.clear()
        return "old"

    assert cache.get_or_create("a", create) == "old"
    assert cache.get_or_create("a", lambda: "new") == "new"


def test_a_value_may_be_created_from_others():
    cache = KeyedCache(2)
    assert (
        cache.get_or_create("a", lambda: cache.get_or_create("b", lambda: 1) + 1) == 2
    )
    # The lock of a key is reentrant.
    same = cache.get_or_create("c", lambda: 1 + cache.get_or_create("c", lambda: 5))
    assert same == cache.get_or_create("c", never) == 5
