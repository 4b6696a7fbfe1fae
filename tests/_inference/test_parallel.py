"""Decoding threads, and the backend of joblib."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import joblib
import pytest
import torch

from sktl._inference.parallel import (
    map_in_threads,
    n_decoding_threads,
    single_openmp_thread,
    uses_process_backend,
)


def test_default_number_of_threads_is_that_of_torch():
    n_threads = torch.get_num_threads()
    assert n_decoding_threads(None) == n_threads
    assert n_decoding_threads(1) == 1
    assert n_decoding_threads(n_threads + 1) == n_threads + 1
    with joblib.parallel_config("threading", n_jobs=n_threads + 2):
        assert n_decoding_threads(None) == n_threads + 2
    with joblib.parallel_config("loky", n_jobs=n_threads + 2):
        assert n_decoding_threads(None) == n_decoding_threads(7) == n_threads


def test_a_process_backend_must_be_chosen():
    assert not uses_process_backend()
    with joblib.parallel_config("threading"):
        assert not uses_process_backend()
    with joblib.parallel_config("loky"):
        assert uses_process_backend()


def test_items_come_in_order_from_several_threads():
    threads = set()

    def load(key):
        threads.add(threading.current_thread())
        time.sleep(0.01 * (key % 3))
        return 2 * key

    items = map_in_threads(load, range(20), n_threads=3, n_ahead=6)
    assert list(items) == list(range(0, 40, 2))
    assert len(threads) == 3
    assert threading.current_thread() not in threads


def test_a_single_item_needs_no_thread():
    items = map_in_threads(
        lambda key: threading.current_thread(), [1], n_threads=2, n_ahead=2
    )
    assert list(items) == [threading.current_thread()]


def test_at_most_n_ahead_items_are_loaded_early():
    loaded = []
    items = map_in_threads(loaded.append, range(50), n_threads=1, n_ahead=4)
    for n_requested in range(1, 20):
        next(items)
        assert len(loaded) <= n_requested + 5
    items.close()
    assert len(loaded) < 30


def test_an_error_cancels_the_other_items():
    loaded = []

    def load(key):
        if key == 3:
            raise ValueError("invalid item")
        loaded.append(key)

    with pytest.raises(ValueError, match="invalid item"):
        list(map_in_threads(load, range(1000), n_threads=2, n_ahead=10))
    assert len(loaded) < 20


def n_threads_of_the_process():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_a_single_openmp_thread():
    def n_started(n_threads):
        torch.set_num_threads(n_threads)  # of this thread
        before = n_threads_of_the_process()
        with single_openmp_thread():
            torch.ones(2**20).add_(1)
        within = n_threads_of_the_process() - before
        torch.ones(2**20).add_(1)
        return within, n_threads_of_the_process() - before

    n_before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(n_started, 4).result() == (0, 3)
    finally:
        torch.set_num_threads(n_before)
