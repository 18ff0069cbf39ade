"""Starts the programs beside this file by torchrun, and collects what their processes leave."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# Otherwise a restarted run may find the addresses of the dead one in torchrun's store, and wait for them.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(program: str, processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*run, f"--max-restarts={restarts}", "-m", f"tests.distributed.{program}", *map(str, arguments)]


def started(program: str, processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    """With one thread in each process."""
    environment = {**os.environ, **OWN_STORE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(program, processes, *arguments, restarts=restarts),
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(running: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for it; fail with what it said unless it ended well."""
    try:
        said, _ = running.communicate(timeout=seconds)
    finally:
        if running.poll() is None:
            running.terminate()  # torchrun ends its processes
            running.wait(60)
    assert running.returncode == 0, said


def left(folder: Path, processes: int) -> list[Any]:
    """What each process left in ``folder``, by rank."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
