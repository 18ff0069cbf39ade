"""Piece ``tests``: the tests that touch CUDA, and the backends that ran in them."""

import re
import subprocess
import sys
from pathlib import Path

from bench.gpu.task import FoundError, Task
from bench.readme import ROOT

# In the order that they are worth.
TESTS = [
    "tests/test_cuda_training.py",
    "tests/test_cuda_direct.py",
    "tests/test_cuda.py",
    "tests/test_cuda_library.py",
    "tests/test_triton.py",
    "tests/test_triton_tiles.py",
    "tests/test_ops.py",
    "tests/test_layers.py",
    "tests/test_scores.py",
    "tests/test_folding.py",
]
TESTS_QUICK = ["tests/test_folding.py"]
PLUGIN = ["-p", "bench.gpu.counting"]  # counts as tests end, for the run may be stopped
COMMAND = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", *PLUGIN]
BACKEND = re.compile(r"^(\w+) by (.+): (\d+) calls$", re.MULTILINE)
KEPT = 30  # lines


def run(task: Task) -> None:
    patterns = TESTS_QUICK if task.quick else TESTS
    chosen = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    counts = task.path.with_suffix(".outcomes")
    command = [*COMMAND, "--outcomes", str(counts), *chosen]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=task.remaining())
        output, ended = done.stdout + done.stderr, f"with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, ended = _text(late.stdout), "out of time"
    outcomes = counted(counts)
    task.tell(
        files=chosen,
        outcomes=outcomes,
        backends={f"{operation} by {name}": int(calls) for operation, name, calls in BACKEND.findall(output)},
    )
    if ended != "with 0" or not outcomes.get("passed"):
        raise FoundError("\n".join([*output.strip().splitlines()[-KEPT:], f"pytest ended {ended}: {outcomes}"]))


def counted(path: Path) -> dict[str, int]:
    """How many tests had which outcome, from the lines that the plugin has left."""
    outcomes: dict[str, int] = {}
    for line in path.read_text().split() if path.exists() else ():
        outcomes[line] = outcomes.get(line, 0) + 1
    return outcomes


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
