"""Piece ``sanitizer``: compute-sanitizer's memcheck and racecheck over ``bench.gpu.small_run``.

Each tensor has memory of its own from the driver, so that an access beyond one is not an access to the next.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
# What a driver is asked and refuses is not an access to memory; a launch that fails ends the program anyway.
OPTIONS = {"memcheck": ("--report-api-errors", "no")}
OUTSIDE_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PROGRAM = [sys.executable, "-m", "bench.gpu.small_run"]
KEPT = 15  # lines


@dataclass(frozen=True)
class Checked:
    """Backends that are checked together. What ``may_be_late`` may run out of time, being compiled for every shape."""

    suffix: str  # of the tools' names in the result
    backends: tuple[str, ...]
    may_be_late: bool = False


ALL = [Checked("", ("cuda", "cuda resident")), Checked(" of Triton", ("triton_operations",), may_be_late=True)]


def run(task: Task) -> None:
    program = shutil.which(TOOL) or shutil.which(TOOL, path=BESIDE_NVCC)
    if program is None or task.device.kind != "cuda":
        task.tell(**{"not run": f"no {TOOL} on PATH" if program is None else "no CUDA device"})
        return
    complaints = []
    for those in ALL:
        for tool, verdict in verdicts(task, program, those):
            task.tell(**{tool + those.suffix: verdict})
            if verdict.get("found") != 0 and not (those.may_be_late and "late" in verdict):
                complaints.append(f"{tool}{those.suffix}: {verdict}")
    if complaints:
        raise FoundError("; ".join(complaints))


def verdicts(task: Task, program: str, those: Checked) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each tool's on the small run of some backends."""
    command = [*PROGRAM, "--backends", *those.backends]
    failed = by_itself(command, task.remaining())  # builds what a sanitizer need not see
    for i, tool in enumerate(TOOLS):
        yield tool, failed or sanitized(program, tool, command, task.remaining() / (len(TOOLS) - i))


def by_itself(command: list[str], seconds: float) -> dict[str, Any]:
    """Why the program can't be checked, for it fails without a sanitizer; nothing where it runs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return late(seconds)
    if done.returncode == 0:
        return {}
    return {"ended": "by itself, with an error", "last": (done.stdout + done.stderr).strip().splitlines()[-KEPT:]}


def late(seconds: float) -> dict[str, Any]:
    return {"ended": f"not within {seconds:.0f} s", "late": True}


def sanitized(program: str, tool: str, command: list[str], seconds: float) -> dict[str, Any]:
    """What ``tool`` counted; "found" is missing where it didn't come to an end."""
    under = [program, "--tool", tool, *OPTIONS.get(tool, ()), *command]
    try:
        done = subprocess.run(
            under, capture_output=True, text=True, check=False, timeout=seconds, env=os.environ | OUTSIDE_CACHE
        )
    except subprocess.TimeoutExpired:
        return late(seconds)
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
