"""Who has the global random generators: one thread at a time, and none keeps them."""

import contextlib
import random
from collections.abc import Iterator
from threading import RLock
from typing import Any

import numpy as np
import torch

_lock = RLock()


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Put torch's global generator of the CPU back to where it was, at the end."""
    # devices=[]: forking those of a GPU would start it.
    with _lock, torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def temporary_seed(device: torch.device, *numbers: int) -> Iterator[None]:
    """Seed all global generators from some numbers, and put them back afterwards.

    Those of torch (on the CPU and on `device`), of NumPy and of Python: an augmentation
    of the user's may draw from any. They belong to all threads: who comes second waits.

    Parameters
    ----------
    device : torch.device
        Where else than on the CPU there is one.
    *numbers : int
        Others, other seeds.
    """
    legacy: Any = np.random  # whose global state has no other interface
    seed, small = np.random.SeedSequence(numbers).generate_state(2, np.uint64).tolist()
    on = [] if device.type == "cpu" else [device.index or 0]
    kind = "cuda" if device.type == "cpu" else device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock)
        stack.callback(random.setstate, random.getstate())
        stack.callback(legacy.set_state, legacy.get_state())
        stack.enter_context(torch.random.fork_rng(devices=on, device_type=kind))
        torch.default_generator.manual_seed(seed)
        if on:
            # `manual_seed` of the module is for the current device.
            state = torch.Generator(device).manual_seed(seed).get_state()
            torch.get_device_module(device).set_rng_state(state, on[0])
        legacy.seed(small % 2**32)
        random.seed(seed)
        yield
