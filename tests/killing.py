"""Programs that are killed at random moments and started again, until they end."""

import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
STARTED = "started"  # what a program prints, and flushes, when what may be interrupted begins


@dataclass(frozen=True)
class Survival:
    """How often a program was killed before it ended, and how long it ran in the end, in seconds from ``STARTED``."""

    kills: int
    seconds: float


def survive(arguments: list[str], kills: int = 0, within: float = 0.0, seed: int = 0) -> Survival:
    """Run ``python *arguments``, kill -9 it ``kills`` times, each up to ``within`` seconds after it says ``STARTED``.

    Then it runs to its end. Raises RuntimeError where it ends by itself otherwise than well.
    """
    chance, killed = random.Random(seed), 0
    while True:
        process = _started(arguments)
        begin = time.monotonic()
        if killed < kills:
            _wait(process, chance.uniform(0, within))
        if killed < kills and process.poll() is None:
            process.kill()
        output = process.communicate()[0]
        if process.returncode == 0:
            return Survival(killed, time.monotonic() - begin)
        if process.returncode > 0 or killed == kills:
            raise RuntimeError(f"{arguments} ended with {process.returncode}:\n{output}")
        killed += 1


def _started(arguments: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    told = []
    for line in process.stdout:
        told.append(line)
        if line.strip() == STARTED:
            return process
    raise RuntimeError(f"{arguments} ended with {process.wait()} before it said that it has started:\n{''.join(told)}")


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
