"""Test session set-up: torchvision beside a CPU build of torch, and a report of the backends that ran, and how."""

from contextlib import suppress

import pytest
import torch

from tests import interpreter  # noqa: F401

# isort: split
from bench.zoo import torchvision
from tests import counting
from tests.toolkits import hopper, no_cuda_tools, tools  # noqa: F401

# Beside a CPU build of torch, torchvision's plain import works only after this one.
with suppress(ImportError):
    torchvision()


def pytest_sessionstart():
    counting.start()


def pytest_collection_finish():
    counting.start_those_of_tests()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("backends that ran")
    for line in counting.report():
        terminalreporter.write_line(line)
    if not torch.cuda.is_available():
        terminalreporter.write_line("no CUDA device: nothing was run on a GPU")
    if _loops:
        terminalreporter.section("scores of training loops: distance from the plain eager fp32 loop's")
        terminalreporter.write_line("in brackets the precision's own error, by plain autograd; relative to the largest")
        for loop, (found, own) in _loops.items():
            figures = [f"{name} {found[name]:.0e} ({own[name]:.0e})" for name in found]
            terminalreporter.write_line(f"{loop}:  {',  '.join(figures)}")


_loops = {}


@pytest.fixture
def record_loop():
    """Keeps how far a loop's scores are from the plain one's, for a table at the end of the report."""
    return lambda loop, found, own: _loops.update({loop: (found, own)})


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, so that an element a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
