"""Operations made wrong on purpose, for tests of what has to notice."""

import pytest
import torch

from taylorkern import backends, direct


def never(*_):
    pytest.fail("timed although it is wrong")


def corrupt(monkeypatch, operation, output=None, dtype=None):
    """Have ``operation``, called from Python, return its outputs, or the one of that number, a hundredth too large."""
    monkeypatch.setattr(direct, "library", lambda: None)
    backend = backends.provider(operation, torch.ones(2, 2))
    right = getattr(backend, operation)

    def wrong(first, *rest):
        found = right(first, *rest)
        if dtype is not None and first.dtype != dtype:
            return found
        if isinstance(found, torch.Tensor):
            return 1.01 * found
        return tuple(1.01 * t if output in (None, i) else t for i, t in enumerate(found))

    monkeypatch.setattr(backend, operation, wrong)
