"""Piece ``facts``: the device and its copy bandwidth, versions, and what would serve an operation there."""

import platform
import shutil
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import taylorkern as tk
from bench import machine
from bench.gpu import providers
from bench.gpu.task import Task
from bench.gpu.timing import stamped
from taylorkern import backends, ops
from taylorkern.layers import fused_batch_norm

COPIED = [2**power for power in range(28, 33)]  # bytes of one copy, far above any cache
COPIED_QUICK = [2**20, 2**21]


def run(task: Task) -> None:
    task.tell(facts=facts() | DETAILS[task.device.kind]())
    task.tell(backends=served(task))
    task.tell(copies=copies(task))


def facts() -> dict[str, Any]:
    """Versions, and the host that launches."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "nvcc": _last_line("nvcc", "--version"),
        "driver": _last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "processor": machine.model(),
        "cores": machine.cores(),
        "python": platform.python_version(),
        "taylorkern": tk.__version__,
    }


def of_cuda() -> dict[str, Any]:
    found = torch.cuda.get_device_properties()
    return {
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "L2": found.L2_cache_size,
        "memory": found.total_memory,
        "cudnn": torch.backends.cudnn.version(),
    }


DETAILS = {"cuda": of_cuda, "cpu": dict}


def served(task: Task) -> list[dict[str, Any]]:
    """The table's backends, in its order: whether each serves, why, and how long its first call took."""
    table = backends.PROVIDERS[task.device.kind]
    return [{"backend": backends.name(backend), **_first_call(task.device.kind, backend)} for backend in table]


def _first_call(kind: str, backend: Any) -> dict[str, Any]:
    """Calls that build what is to be built: kernels, and the library that calls them from autograd."""
    a = torch.ones(2, 64, 4, 4, device=kind)
    layer = tk.BatchNorm2d(64).to(kind)
    status, raised = getattr(backend, "status", None), ""
    start = time.perf_counter()
    try:
        with providers.serving(kind, backend):
            serves = bool((ops.channel_scores(a, a) == 16).all())
            fused_batch_norm(layer, None, a.clone().requires_grad_(), None, "relu").sum().backward()
    except Exception as error:  # told here; the other pieces have to do without this backend
        serves, raised = False, f" ({type(error).__name__}: {error})"
    why = status().reason if status else "always there"
    return {"serves": serves, "why": why + raised, "first call, s": time.perf_counter() - start}


def copies(task: Task) -> list[dict[str, Any]]:
    """GB/s of a copy within the device, reads and writes counted."""
    found = []
    for count in COPIED_QUICK if task.quick else COPIED:
        source = torch.randint(256, (count,), dtype=torch.uint8, device=task.device.kind)
        target = torch.empty_like(source)
        times = stamped({"copy": lambda to=target, of=source: to.copy_(of)}, 20, task.device).times["copy"]  # type: ignore[misc]
        found.append({"bytes": count, "GB/s": 2 * count / statistics.median(times) / 1e9})
    return found


def _version(package: str) -> str | None:
    """Of an installed package, which is not imported: timm would bring torchvision along."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _last_line(program: str, *arguments: str) -> str | None:
    """The last line that a program prints; None where it is missing or fails."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.strip().splitlines()
    return lines[-1].strip() if lines and done.returncode == 0 else None
