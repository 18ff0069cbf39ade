"""The machine that a bench ran on, in words that name no host and no path."""

import datetime
import os
import platform
import re
from pathlib import Path

import torch

import taylorkern

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def model() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line for line in lines if line.lower().startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(processor: str, count: int) -> str:
    """A file's name for a machine.

    >>> slug("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", 4)
    'intel-xeon-platinum-8370c-4-cores'
    """
    plain = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*", " ", processor.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", plain), str(count), "core" if count == 1 else "cores"])


def caches() -> dict[str, str]:
    """Level and kind of the first core's caches, with their sizes; empty where the system doesn't tell.

    A virtual machine may be told of caches that it shares with others.
    """
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def facts() -> dict[str, object]:
    """What a result has to be read beside."""
    return {
        "machine": slug(model(), cores()),
        "processor": model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "caches": caches(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "taylorkern": taylorkern.__version__,
        "date": datetime.date.today().isoformat(),
    }
