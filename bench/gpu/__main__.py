"""Tests and measures taylorkern on a GPU, offline: python -m bench.gpu [--only PIECE ...] [--budget SECONDS]

Each piece runs in a process of its own and puts its part into bench/results/gpu-<device>.json, beside what other calls
have put there, so that a machine that is there for ten minutes only can be used in several turns. A piece that fails
or outruns its time is recorded as failed, with its last lines and what it had found, and the others go on.

Ends with 0 if every piece that was asked for is done and well, else with 1; a bar that is missed is told, and fails
nothing. --keep-choice puts the result's fastest backends into the provider table's file and measures nothing unless
pieces are named. --device cpu --quick tries all of it on a processor.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.gpu import choice, page, result
from bench.gpu.device import DEVICES
from bench.gpu.pieces import BUDGET, PIECES
from bench.readme import ROOT
from taylorkern.backends.choice import MEASURED

KEPT = 20  # lines of a piece that failed
NOT_STARTED = "not started"
WELL = ("done", "not run")
LEAST = 5.0  # seconds that a piece is worth starting for
Part = dict[str, Any]


def shared(seconds: float, names: list[str]) -> float:
    """What the first of ``names`` gets of ``seconds``, if all get what they usually do in proportion.

    >>> shared(sum(PIECES[name].seconds for name in PIECES), list(PIECES)) == PIECES["facts"].seconds
    True
    """
    return seconds * PIECES[names[0]].seconds / sum(PIECES[name].seconds for name in names)


def attempted(name: str, seconds: float, device: str, quick: bool) -> Part:
    """What a piece has found within ``seconds``, and how it ended."""
    if seconds < LEAST:
        return {"status": NOT_STARTED, "why": f"{seconds:.0f} s were left"}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", "bench.gpu.pieces", name, "--device", device, "--part", str(part)]
        command += ["--seconds", f"{seconds:.0f}", *["--quick"] * quick]
        start = time.monotonic()
        ended, output = ran(command, seconds)
        found = json.loads(part.read_text()) if part.exists() else {}
    told = {"seconds": round(time.monotonic() - start, 1)} | found
    if ended:
        return told | {"status": "failed", "why": ended, "last": nameless(output).strip().splitlines()[-KEPT:]}
    return told | {"status": "not run" if "not run" in found else "done"}


def nameless(output: str) -> str:
    """What a process printed, without the folders of this machine."""
    return output.replace(f"{ROOT}{os.sep}", "").replace(f"{sys.prefix}{os.sep}", "")


def ran(command: list[str], seconds: float) -> tuple[str, str]:
    """How a command ended, "" if well, and what it printed. It is stopped after ``seconds``, all it has started too."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            ended = "" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after its {seconds:.0f} s"
        finally:
            stop(process)
        output.seek(0)
        return ended, output.read()


def stop(process: subprocess.Popen) -> None:
    """End a process that leads a group, and whatever it has left of the group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    names: list[str], seconds: float, attempt: Callable[[str, float], Part], keep: Callable[[str, Part], None]
) -> bool:
    """All pieces in turn, each kept as it ends; whether all are well. What one leaves of its time the others get."""
    until = time.monotonic() + seconds
    well = True
    for i, name in enumerate(names):
        part = attempt(name, shared(max(0.0, until - time.monotonic()), names[i:]))
        keep(name, part)
        well = well and part["status"] in WELL
        print(f"gpu-check: {name}: {summary(part)}", file=sys.stderr, flush=True)
        print(*part.get("last", []), sep="\n", end="\n" * bool(part.get("last")), file=sys.stderr, flush=True)
    return well


def summary(part: Part) -> str:
    told = [part["status"], *(f"{part[key]:.0f} s" for key in ("seconds",) if key in part)]
    told += [part[key] for key in ("why", "not run") if key in part]
    left = part.get("left", [])
    return ", ".join([*told, *[f"{len(left)} left out for want of time"] * bool(left)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PIECES), metavar="PIECE", help=f"of {', '.join(PIECES)}")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all; {BUDGET} by default")
    parser.add_argument("--json", type=Path, help="where to keep the result; bench/results/gpu-DEVICE.json by default")
    parser.add_argument("--device", choices=list(DEVICES), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds, to try the check itself")
    parser.add_argument("--keep-choice", action="store_true", help="put the fastest backends into the provider table")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; --device cpu --quick tries the check itself", file=sys.stderr)
        return 2
    device = DEVICES[options.device]().name()
    trial = options.quick or options.device == "cpu"
    path: Path | None = options.json or (None if trial else result.place(device))
    names = [name for name in PIECES if name in (options.only or ([] if options.keep_choice else PIECES))]
    found = result.merged(result.read(path) if path else None, device, trial, {})

    def keep(name: str, part: Part) -> None:
        nonlocal found
        if part["status"] == NOT_STARTED and name in found["pieces"]:
            return  # what another call has measured stands
        found = result.merged(found, device, trial, {name: part})
        if path:
            result.write(path, found)

    well = run(names, options.budget, lambda name, s: attempted(name, s, options.device, options.quick), keep)
    print(page.ending(found))
    if path:
        print(f"gpu-check: kept in {path}", file=sys.stderr)
    if options.keep_choice:
        print(f"gpu-check: {choice.keep(found)} rows kept in {MEASURED}", file=sys.stderr)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
