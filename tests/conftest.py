"""Test session set-up: torchvision beside a CPU build of torch, and a report of the backends that ran, and how."""

from collections import Counter
from contextlib import suppress
from functools import wraps

import pytest
import torch

from bench.zoo import torchvision
from taylorkern import backends, direct

# Beside a CPU build of torch, torchvision's plain import works only after this one.
with suppress(ImportError):
    torchvision()

_calls: Counter[str] = Counter()


def _counted(name: str, function):
    @wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        _calls[name] += result is not None
        return result

    return call


def pytest_sessionstart():
    for providers in backends.PROVIDERS.values():
        for backend in providers:
            for operation in backends.OPERATIONS:
                function = getattr(backend, operation)
                if not hasattr(function, "__wrapped__"):
                    short = backend.__name__.rpartition(".")[2]
                    setattr(backend, operation, _counted(f"{operation} by {short}", function))
    for name in ("fused", "gated"):
        if not hasattr(getattr(direct, name), "__wrapped__"):
            setattr(
                direct, name, _counted(f"{name} batch normalisation in C++, its backward too", getattr(direct, name))
            )


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("backends that ran")
    for name, count in sorted(_calls.items()):
        terminalreporter.write_line(f"{name}: {count} calls")
    if not torch.cuda.is_available():
        terminalreporter.write_line("no CUDA device: nothing was run on a GPU")


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, so that an element a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
