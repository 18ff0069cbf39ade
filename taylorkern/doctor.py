"""What would serve each operation on this machine, and why. Looks only: it compiles, loads and writes nothing."""

import os
import platform
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import backends
from ._version import __version__
from .backends import build, nvcc, toolchain
from .backends.native import Status
from .backends.toolchain import BuildError, Toolchain

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def examine() -> dict[str, Any]:
    """The facts, ready for JSON; ``tell`` makes text of them."""
    status = cache(_status)  # of each backend once: it asks compilers
    return {
        "versions": {
            "taylorkern": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "compiler": _compiler(toolchain.find_toolchain),
        "nvcc": _compiler(nvcc.find_toolchain),
        "cache": _cache(),
        "operations": {
            operation: {
                device: {str(dtype).removeprefix("torch."): _serving(device, dtype, status) for dtype in DTYPES}
                for device in backends.PROVIDERS
            }
            for operation in backends.OPERATIONS
        },
    }


def tell(facts: Mapping[str, Any]) -> str:
    """The facts as text, one line per operation and device, reasons listed once below."""
    versions, machine, compilers = facts["versions"], facts["machine"], (facts["compiler"], facts["nvcc"])
    cached = facts["cache"]
    compiler, device_compiler = (found["version"] or found["missing"] for found in compilers)
    cuda = ", ".join(machine["cuda_devices"]) or "no device"
    cells = [s["backend"] for devices in facts["operations"].values() for row in devices.values() for s in row.values()]
    width = 2 + max(map(len, (*cells, "bfloat16")))
    told = [f"{'operation':<26}{'device':<8}" + "".join(f"{str(d).removeprefix('torch.'):<{width}}" for d in DTYPES)]
    reasons: dict[str, None] = {}
    for operation, devices in facts["operations"].items():
        for device, dtypes in devices.items():
            told.append(f"{operation:<26}{device:<8}" + "".join(f"{s['backend']:<{width}}" for s in dtypes.values()))
            for dtype, serving in dtypes.items():
                reasons[f"{device} {dtype}: {serving['backend']}, {serving['why']}"] = None
    return "\n".join(
        [
            f"taylorkern {versions['taylorkern']}, torch {versions['torch']}, Python {versions['python']}",
            f"machine    {machine['system']}, {machine['vectors']}, {machine['threads']} threads; CUDA: {cuda}",
            f"compiler   {compiler}",
            f"nvcc       {device_compiler}",
            f"cache      {cached['folder']} ({cached['builds']} builds, {cached['state']})",
            "",
            *(line.rstrip() for line in told),
            "",
            *reasons,
        ]
    )


def _serving(device: str, dtype: torch.dtype, status: Callable[[Any], Status | None]) -> dict[str, str]:
    """The first backend without an objection, as the provider table will choose it."""
    objections: list[str] = []
    for backend in backends.PROVIDERS[device]:
        name, objection = backend.__name__.rpartition(".")[2], _objection(backend, dtype, status(backend))
        if objection is None:
            return {"backend": name, "why": "; ".join(objections) or _merit(status(backend))}
        objections.append(f"{name} can't: {objection}")
    return {"backend": "none", "why": "; ".join(objections)}


def _status(backend: Any) -> Status | None:
    """A backend's own; the plain reference has no limits and no state."""
    return backend.status() if hasattr(backend, "status") else None


def _objection(backend: Any, dtype: torch.dtype, status: Status | None) -> str | None:
    """Why ``backend`` can't serve ``dtype``."""
    if dtype not in getattr(backend, "DTYPES", DTYPES):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    return None if status is None or status.usable else status.reason


def _merit(status: Status | None) -> str:
    if status is None:
        return "the only backend for this device"
    return ", ".join([status.reason, *(f"{key} {value}" for key, value in status.detail.items())])


def _compiler(find: Callable[[], Toolchain]) -> dict[str, str | None]:
    try:
        found = find()
    except BuildError as error:
        return {"command": None, "version": None, "missing": str(error)}
    return {"command": found.command, "version": found.identity, "missing": None}


def _cache() -> dict[str, Any]:
    folder = build.cache_root()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return {
        "folder": str(folder),
        "builds": len(list(folder.glob("*/build.json"))),
        "state": "writable" if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable",
    }
