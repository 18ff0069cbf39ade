"""Kill ``taylorkern prune`` at random moments until it has ended all the same: ``python -m tests.job_kills``.

One run is left alone. Then others of the same settings are killed with SIGKILL, DataLoader's workers too, and started
again: after a random time, or as soon as a file of a kind is being written. Each ends with the same network, bit for
bit, and the same history, or the exit code is 1. Behind ``--``: other options of ``taylorkern prune``.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests import digits_folder, jobs

LONGER = "--workers 1 --augment --epochs 4 --prune-epochs 4 --finetune-epochs 4".split()
FILES = ["checkpoints", "pruned.safetensors", "report.html", "summary.json", "history.jsonl"]
EVERY = 3  # one kill of so many waits for a file
LITTER = (".partial", ".tmp")
TRIES = 4  # starts for each kill, for some runs end before their moment
PATIENCE = 900.0  # seconds after which a run is taken for stuck
GLANCE = 0.001  # seconds between two looks at the folder


class FailedError(RuntimeError):
    """The command itself gave up, or didn't end."""


@dataclass(frozen=True)
class Kill:
    """A moment: ``seconds`` after the start, or where ``file`` is named, so long after its writing began."""

    seconds: float
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s after the start" if self.file is None else f"{self.file} being written"


@dataclass(frozen=True)
class Attempt:
    """One start: what was to end it, how long it ran, and whether it was killed."""

    kill: Kill | None
    seconds: float
    killed: bool

    def __str__(self) -> str:
        how = "killed" if self.killed else "ended"
        return f"{self.kill or 'not to be killed'!s:<40}{how} after {self.seconds:6.2f} s"


def moments(seed: int, reach: float) -> Iterator[Kill]:
    """Moments without end: up to ``reach`` seconds after a start, and every third at the writing of a file."""
    draw = random.Random(seed)
    for number in itertools.count(1):
        if number % EVERY:
            yield Kill(draw.uniform(0, reach))
        else:
            yield Kill(draw.choice([0.0, draw.uniform(0, 0.01)]), FILES[number // EVERY % len(FILES)])


def run(command: list[str], out: Path, log: Path, kill: Kill | None) -> bool:
    """Start the command and let it be, or kill its group at that moment; whether it ended by itself."""
    process = jobs.start(command, log)
    due = _due(kill, out)
    limit = time.monotonic() + PATIENCE
    try:
        while process.poll() is None and not due():
            if time.monotonic() > limit:
                raise FailedError(f"it has not ended within {PATIENCE:.0f} s; see {log}")
            time.sleep(GLANCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise FailedError(f"it ended with exit code {code}: {_last(log)}")
    return code == 0


def _due(kill: Kill | None, out: Path) -> Callable[[], bool]:
    if kill is None:
        return lambda: False
    start, before = time.monotonic(), _stamps(out)
    if kill.file is None:
        return lambda: time.monotonic() >= start + kill.seconds
    seen: list[float] = []

    def changed() -> bool:
        if not seen and any(kill.file in name and before.get(name) != at for name, at in _stamps(out).items()):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() >= seen[0] + kill.seconds

    return changed


def _stamps(out: Path) -> dict[str, int]:
    """When each file in the folder last changed; those that vanish meanwhile are left out."""
    found = {}
    for place, _, names in os.walk(out):
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):
                found[os.path.relpath(path, out)] = os.stat(path).st_mtime_ns
    return found


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "it said nothing")


def trial(folder: Path, kills: int, seed: int, options: Sequence[str]) -> list[str]:
    """Kill so often, and let what is left go to its end; what was found wrong, in words.

    ``folder`` keeps a log, the run that was left alone, and the folders of those that ended otherwise.
    """
    data, log, alone = folder / "digits", folder / "log.txt", folder / "left-alone"
    digits_folder.write(data, 8, per_class=40)
    whole = _attempt(data, alone, log, options).seconds
    start_up = _attempt(data, alone, log, options).seconds  # a finished folder is only told about
    print(f"left alone it takes {whole:.1f} s; to start and do nothing, {start_up:.1f} s", flush=True)
    drawn = moments(seed, 2 * (start_up + max(whole - start_up, 0.0) / max(kills, 1)))
    wrong: list[str] = []
    life = killed = 0
    for _ in range(TRIES * kills + 1):
        out = folder / f"life-{life}"
        attempt = _attempt(data, out, log, options, next(drawn) if killed < kills else None)
        killed += attempt.killed
        print(f"{life:>4}  {attempt}", flush=True)
        if attempt.killed:
            continue
        wrong += _judged(alone, out, life)
        life += 1
        if killed == kills:
            return wrong
    raise FailedError(f"of {TRIES * kills + 1} starts only {killed} were killed in time")


def _attempt(data: Path, out: Path, log: Path, options: Sequence[str], kill: Kill | None = None) -> Attempt:
    started = time.monotonic()
    ended = run(jobs.arguments(data, out, *options), out, log, kill)
    return Attempt(kill, time.monotonic() - started, not ended)


def _judged(alone: Path, out: Path, life: int) -> list[str]:
    """What the life that has ended left otherwise; a good one's folder goes."""
    found = jobs.differences(alone, out) + [name for name in _stamps(out) if name.endswith(LITTER)]
    print(f"{life:>4}  is over: {', '.join(found) or 'the same'}", flush=True)
    if not found:
        shutil.rmtree(out)
    return [f"life {life} ended with other or left-over files: {', '.join(found)}"] if found else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.job_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="an empty folder (default: a temporary one)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of taylorkern prune, to replace its own")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            wrong = trial(folder, options.kills, options.seed, [*LONGER, *options.options])
        except FailedError as failure:
            wrong = [str(failure)]
    print("\n".join(wrong) or f"{options.kills} kills, and the same bits as the run that was left alone")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
