"""Ways under torch.compile: the same step with the model compiled, from an empty cache."""

import atexit
import os
import tempfile
from dataclasses import replace

import torch

from bench.ways import Prepared, Way
from bench.workload import Workload


def compiled(way: Way, backend: str = "inductor") -> Way:
    """``way`` with its model under torch.compile; its first step compiles. The graph may break where it has to.

    What is compiled for other shapes or dtypes is other code, so only the timed model itself is checked.
    """

    def prepare(w: Workload) -> Prepared:
        _empty_cache()
        torch.compiler.reset()
        return way.prepare(w.compiled(backend))

    return replace(way, name=f"compiled {way.name}", prepare=prepare, checked_small=False)


def _empty_cache() -> None:
    """Have torch.compile keep its results in a new folder, which is there until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="bench-compiled-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
