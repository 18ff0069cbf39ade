"""Where the tests of GPUs run: on one where it is, and on the CPU, so that their own code is known to work."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from taylorkern import backends, direct

NO_GPU = "there is no CUDA device"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
MARKS = {"cpu": (), "cuda": (needs_gpu,)}
DEVICES = [pytest.param(device, marks=marks) for device, marks in MARKS.items()]
# Every backend by itself, where it is in the table
PROVIDERS = [
    pytest.param(device, provider, marks=marks, id=f"{device}-{backends.name(provider)}")
    for device, marks in MARKS.items()
    for provider in backends.PROVIDERS[device]
]
COMPILED = [p for p in PROVIDERS if p.values[1] is not backends.reference]


def serves(device: str, provider: Any, *dtypes: torch.dtype) -> None:
    """Skip where ``provider`` does not know a dtype or what it is made by is absent; fail where it should serve."""
    for dtype in dtypes:
        if dtype not in getattr(provider, "DTYPES", dtypes):
            pytest.skip(f"{backends.name(provider)} does not know {dtype}")
        some = torch.ones(1, 1, dtype=dtype, device=device)
        if all(provider.supports(operation, some) for operation in backends.OPERATIONS):
            continue
        reason = f"{backends.name(provider)}: {provider.status().reason}"
        maker = "triton" if "triton" in backends.name(provider) else "nvcc" if device == "cuda" else "c++"
        if (find_spec if maker == "triton" else shutil.which)(maker):
            pytest.fail(f"there is {maker}, but {reason}")
        pytest.skip(reason)


@contextmanager
def forced(device: str, provider: Any) -> Iterator[None]:
    """Has ``provider`` serve everything that it can, called from Python as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.PROVIDERS, device, tuple(dict.fromkeys((provider, backends.reference))))
        patch.setattr(direct, "library", lambda: None)
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Float32 is computed in float32, and by the same kernels every time."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


def captured(device: str, work: Callable[[], object], settle: Callable[[], object] = lambda: None) -> Callable:
    """``work`` as a CUDA graph, to be replayed: it has run three times before, then ``settle``; on the CPU, itself."""
    if device == "cpu":
        for _ in range(3):
            work()
        settle()
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
        settle()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Within, whatever makes the CPU wait for the GPU raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
