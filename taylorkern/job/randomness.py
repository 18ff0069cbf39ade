"""The global random numbers of Python, numpy and torch: seeded together, or kept as they are."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from taylorkern import randomness


def seed(*numbers: int) -> None:
    """Seed all of them by ``numbers``."""
    drawn = random.Random(" ".join(map(str, numbers))).getrandbits(32)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


@contextmanager
def kept() -> Iterator[None]:
    """Put all of them back in the end.

    >>> before = torch.get_rng_state()
    >>> with kept():
    ...     seed(1, 2)
    >>> bool(torch.equal(before, torch.get_rng_state()))
    True
    """
    before = randomness.state_dict()
    try:
        yield
    finally:
        randomness.load_state_dict(before)
