"""Temporary seeds of the global random number generators, under a lock.

The global generators belong to the whole process: while one thread uses them, other
threads wait, and afterwards their previous state is restored.
"""

import contextlib
import random
from collections.abc import Iterator
from threading import RLock
from typing import Any

import numpy as np
import torch

from sktl._utils.default_dtype import float32_default_if_needed

_lock = RLock()


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of torch's global CPU generator on exit."""
    # devices=[]: saving the state of a GPU generator would initialize the GPU.
    with _lock, torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def temporary_seed(device: torch.device, *entropy: int) -> Iterator[None]:
    """Seed all global generators, and restore their previous state on exit.

    Seeds torch (on the CPU and on `device`), NumPy and Python, since a user-defined
    augmentation may use any of them. Other threads wait until the context exits. The
    default data type is float32, since torch draws other numbers for float64.

    Parameters
    ----------
    device : torch.device
        Device whose generator is seeded besides that of the CPU.
    *entropy : int
        Non-negative integers from which the seed is derived.
    """
    legacy: Any = np.random  # NumPy has no other interface to its global state
    seed, seed_2 = np.random.SeedSequence(entropy).generate_state(2, np.uint64).tolist()
    device_ids = [] if device.type == "cpu" else [device.index or 0]
    device_type = "cuda" if device.type == "cpu" else device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock)
        stack.callback(random.setstate, random.getstate())
        stack.callback(legacy.set_state, legacy.get_state())
        stack.enter_context(
            torch.random.fork_rng(devices=device_ids, device_type=device_type)
        )
        torch.default_generator.manual_seed(seed)
        if device_ids:
            # `manual_seed` of the device module would seed the current device instead.
            state = torch.Generator(device).manual_seed(seed).get_state()
            torch.get_device_module(device).set_rng_state(state, device_ids[0])
        legacy.seed(seed_2 % 2**32)
        random.seed(seed)
        stack.enter_context(float32_default_if_needed())
        yield
