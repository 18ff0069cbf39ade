"""What would serve each operation on this machine, and why. Looks only: it compiles, loads and writes nothing."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import backends
from ._version import __version__
from .backends import build, toolchain

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def examine() -> dict[str, Any]:
    """The facts, ready for JSON; ``tell`` makes text of them."""
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
        "compiler": _compiler(),
        "cache": _cache(),
        "operations": {
            operation: {
                device: {str(dtype).removeprefix("torch."): _serving(device, dtype) for dtype in DTYPES}
                for device in backends.PROVIDERS
            }
            for operation in backends.OPERATIONS
        },
    }


def tell(facts: Mapping[str, Any]) -> str:
    """The facts as text, one line per operation and device, reasons listed once below."""
    versions, machine, compiler, cache = (facts[key] for key in ("versions", "machine", "compiler", "cache"))
    cuda = ", ".join(machine["cuda_devices"]) or "no device"
    told = [f"{'operation':<26}{'device':<8}" + "".join(f"{str(d).removeprefix('torch.'):<11}" for d in DTYPES)]
    reasons: dict[str, None] = {}
    for operation, devices in facts["operations"].items():
        for device, dtypes in devices.items():
            told.append(f"{operation:<26}{device:<8}" + "".join(f"{s['backend']:<11}" for s in dtypes.values()))
            for dtype, serving in dtypes.items():
                reasons[f"{device} {dtype}: {serving['backend']}, {serving['why']}"] = None
    return "\n".join(
        [
            f"taylorkern {versions['taylorkern']}, torch {versions['torch']}, Python {versions['python']}",
            f"machine    {machine['system']}, {machine['vectors']}, {machine['threads']} threads; CUDA: {cuda}",
            f"compiler   {compiler['version'] or compiler['missing']}",
            f"cache      {cache['folder']} ({cache['builds']} builds, {cache['state']})",
            "",
            *(line.rstrip() for line in told),
            "",
            *reasons,
        ]
    )


def _serving(device: str, dtype: torch.dtype) -> dict[str, str]:
    """The first backend without an objection, as the provider table will choose it."""
    objections: list[str] = []
    for backend in backends.PROVIDERS[device]:
        name, objection = backend.__name__.rpartition(".")[2], _objection(backend, dtype)
        if objection is None:
            return {"backend": name, "why": "; ".join(objections) or _merit(backend)}
        objections.append(f"{name} can't: {objection}")
    return {"backend": "none", "why": "; ".join(objections)}


def _objection(backend: ModuleType, dtype: torch.dtype) -> str | None:
    """Why ``backend`` can't serve ``dtype``; the plain reference has no limits and no state."""
    if dtype not in getattr(backend, "DTYPES", DTYPES):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    status = backend.status() if hasattr(backend, "status") else None
    return None if status is None or status.usable else status.reason


def _merit(backend: ModuleType) -> str:
    if not hasattr(backend, "status"):
        return "the only backend for this device"
    status = backend.status()
    return ", ".join([status.reason, *(f"{key} {value}" for key, value in status.detail.items())])


def _compiler() -> dict[str, str | None]:
    try:
        found = toolchain.find_toolchain()
    except toolchain.BuildError as error:
        return {"command": None, "version": None, "missing": str(error)}
    return {"command": " ".join(found.compiler), "version": found.version.splitlines()[0], "missing": None}


def _cache() -> dict[str, Any]:
    folder = build.cache_root()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return {
        "folder": str(folder),
        "builds": len(list(folder.glob("*/build.json"))),
        "state": "writable" if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable",
    }
