"""The global random numbers of Python, numpy and torch: seeded together, or kept as they are."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from taylorkern import randomness


def seed(*numbers: int) -> None:
    """Seed all of them by ``numbers``."""
    drawn = _drawn(numbers)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def seed_generators(loader: Any, *numbers: int) -> None:
    """Seed the generators of ``loader``, a DataLoader, and of its samplers by ``numbers``; others have none.

    >>> loader = torch.utils.data.DataLoader([1, 2], generator=torch.Generator())
    >>> seed_generators(loader, 0, 3)
    >>> loader.generator.initial_seed() == random.Random("0 3").getrandbits(32)
    True
    """
    batches = getattr(loader, "batch_sampler", None)
    for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(_drawn(numbers))


def _drawn(numbers: tuple[int, ...]) -> int:
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)


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
