"""Global generators are seeded temporarily, and their state is restored."""

import random
import threading

import numpy as np
import pytest
import torch

from sktl._utils.random_state import preserve_rng_state, temporary_seed

CPU = torch.device("cpu")


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002  (tests the global generator)


def test_seed_depends_on_all_entropy():
    drawn = []
    for entropy in [(1, 2), (1, 2), (1, 3), (2, 2)]:
        with temporary_seed(CPU, *entropy):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_state_is_restored(error):
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


def test_preserve_rng_state_waits_for_other_threads():
    order = []

    def draw_and_restore():
        with preserve_rng_state():
            torch.rand(3)
            order.append("restored")

    with temporary_seed(CPU, 5):
        thread = threading.Thread(target=draw_and_restore)
        thread.start()
        thread.join(0.05)
        order.append("done")
        after = draw()
    thread.join()
    assert order == ["done", "restored"]
    with temporary_seed(CPU, 5):
        assert draw() == after
