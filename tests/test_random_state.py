"""Global generators are seeded from numbers, and come back as they were."""

import random
import threading

import numpy as np
import pytest
import torch

from sktl._random_state import borrowed_generator, seeded

CPU = torch.device("cpu")


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002  (the global one is meant)


def test_same_numbers_same_draws():
    drawn = []
    for numbers in [(1, 2), (1, 2), (1, 3), (2, 2)]:
        with seeded(CPU, *numbers):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_what_was_global_before_is_after(error):
    with seeded(CPU, 5):
        before = draw()
    with seeded(CPU, 5):
        try:
            with seeded(CPU, 7):
                draw()
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert draw() == before


def test_borrowing_waits_for_who_has_it():
    order = []

    def borrow():
        with borrowed_generator():
            torch.rand(3)
            order.append("borrowed")

    with seeded(CPU, 5):
        thread = threading.Thread(target=borrow)
        thread.start()
        thread.join(0.05)
        order.append("done")
        after = draw()
    thread.join()
    assert order == ["done", "borrowed"]
    with seeded(CPU, 5):
        assert draw() == after
