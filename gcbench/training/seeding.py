"""Seeds the random generators that modelling code draws from. Imports torch."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Set Python's, NumPy's and torch's global generators, those of all devices too, as transformers' set_seed does.

    A generator of a model's own, and what the operating system draws, cannot be set from outside.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more
    torch.manual_seed(seed)


@contextmanager
def generators_restored(devices: Sequence[str]) -> Iterator[None]:
    """Leave the generators as they were before the context; torch's on the CPU and on `devices`."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def state_outside_torch() -> object:
    """Return the states of Python's and NumPy's generators: equal when neither has been drawn from in between."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))
