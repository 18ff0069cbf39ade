"""Piece ``sanitizer``: compute-sanitizer's memcheck and racecheck over ``bench.gpu.small_run``.

Each tensor has memory of its own from the driver, so that an access beyond one is not an access to the next.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.task import FoundError, Task

TOOL = "compute-sanitizer"
BESIDE_NVCC = Path("/usr/local/cuda/bin")  # where it is installed, on PATH or not
TOOLS = ("memcheck", "racecheck")
SUMMARIES = {
    "memcheck": re.compile(r"^=+ ERROR SUMMARY: (\d+) errors?", re.MULTILINE),
    "racecheck": re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed", re.MULTILINE),
}
OUTSIDE_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PROGRAM = [sys.executable, "-m", "bench.gpu.small_run"]
KEPT = 15  # lines


def run(task: Task) -> None:
    program = shutil.which(TOOL) or shutil.which(TOOL, path=BESIDE_NVCC)
    if program is None or task.device.kind != "cuda":
        task.tell(**{"not run": f"no {TOOL} on PATH" if program is None else "no CUDA device"})
        return
    command = PROGRAM
    plain = subprocess.run(command, capture_output=True, text=True, check=False, timeout=task.remaining())
    task.tell(run=(plain.stdout + plain.stderr).strip().splitlines()[-KEPT:])  # builds what a sanitizer need not see
    if plain.returncode:
        raise FoundError(f"{' '.join(command)} ended with {plain.returncode}")
    complaints = []
    for i, tool in enumerate(TOOLS):
        verdict = sanitized(program, tool, command, task.remaining() / (len(TOOLS) - i))
        task.tell(**{tool: verdict})
        complaints += [f"{tool}: {verdict}"] if verdict.get("found") != 0 else []
    if complaints:
        raise FoundError("; ".join(complaints))


def sanitized(program: str, tool: str, command: list[str], seconds: float) -> dict[str, Any]:
    """What ``tool`` counted; "found" is missing where it didn't come to an end."""
    under = [program, "--tool", tool, *command]
    try:
        done = subprocess.run(
            under, capture_output=True, text=True, check=False, timeout=seconds, env=os.environ | OUTSIDE_CACHE
        )
    except subprocess.TimeoutExpired:
        return {"ended": f"not within {seconds:.0f} s"}
    return parsed(tool, done.stdout + done.stderr, done.returncode)


def parsed(tool: str, output: str, returncode: int) -> dict[str, Any]:
    """Findings by the tool's own summary; of several, one per process, all count.

    >>> parsed("memcheck", "========= ERROR SUMMARY: 0 errors", 0)
    {'found': 0}
    >>> parsed("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 0)["found"]
    2
    """
    counts = [int(count) for count in SUMMARIES[tool].findall(output)]
    clean = counts and not sum(counts) and not returncode
    if clean:
        return {"found": 0}
    told = {"returncode": returncode, "last": output.strip().splitlines()[-KEPT:]}
    return told | ({"found": sum(counts)} if sum(counts) else {"ended": "without a summary of no errors"})
