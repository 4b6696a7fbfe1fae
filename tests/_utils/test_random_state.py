"""Global generators are seeded from numbers, and come back as they were."""

import random
import threading

import numpy as np
import pytest
import torch

from sktl._utils.random_state import preserve_rng_state, temporary_seed

CPU = torch.device("cpu")


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002  (the global one is meant)


def test_same_numbers_same_draws():
    drawn = []
    for numbers in [(1, 2), (1, 2), (1, 3), (2, 2)]:
        with temporary_seed(CPU, *numbers):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_what_was_global_before_is_after(error):
    with temporary_seed(CPU, 5):
        before = draw()
    with temporary_seed(CPU, 5):
        try:
            with temporary_seed(CPU, 7):
                draw()
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert draw() == before


def test_borrowing_waits_for_who_has_it():
    order = []

    def borrow():
        with preserve_rng_state():
            torch.rand(3)
            order.append("borrowed")

    with temporary_seed(CPU, 5):
        thread = threading.Thread(target=borrow)
        thread.start()
        thread.join(0.05)
        order.append("done")
        after = draw()
    thread.join()
    assert order == ["done", "borrowed"]
    with temporary_seed(CPU, 5):
        assert draw() == after
