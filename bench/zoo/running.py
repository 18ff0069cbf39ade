"""Every network in a process of its own, within limits of time and memory: a crash or a hang costs one row."""

import json
import multiprocessing
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from taylorkern.companion import torchvision

from .examination import Row, examine
from .families import FAMILIES

Job = tuple[str, str, int]  # family, network, seed


@dataclass(frozen=True)
class Limits:
    seconds: float
    gigabytes: float


def jobs(families: Iterable[str], seeds: int) -> list[Job]:
    """Of every family whose package is installed."""
    present = [family for family in families if find_spec(FAMILIES[family].package)]
    return [(family, name, seed) for family in present for name in FAMILIES[family].names() for seed in range(seeds)]


def run(todo: Iterable[Job], limits: Limits) -> Iterator[Row]:
    """One after the other. The processes are forked: nothing is computed here, so there are no threads to lose."""
    todo = list(todo)
    for package in {FAMILIES[family].package for family, _, _ in todo} - {"torchvision"}:
        torchvision()
        import_module(package)
    for job in todo:
        yield run_one(job, limits)


def run_one(job: Job, limits: Limits) -> Row:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(sending, job, limits), daemon=True)
    process.start()
    sending.close()
    try:
        return _heard(receiving, process, Row(*job, result="failed"), limits)
    finally:
        process.kill()
        process.join()


def _work(sending: Connection, job: Job, limits: Limits) -> None:
    limit = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sending.send(examine(*job, begins=sending.send))


def _heard(receiving: Connection, process: Any, row: Row, limits: Limits) -> Row:
    """The row that the process sends, or ``row`` with what became of it."""
    end = time.monotonic() + limits.seconds
    while receiving.poll(max(0.0, end - time.monotonic())):
        try:
            said = receiving.recv()
        except EOFError:
            process.join()
            row.note = f"the process ended with exit code {process.exitcode}"
            return row
        if isinstance(said, Row):
            return said
        row.stage = said
    row.note = f"took longer than {limits.seconds:.0f} s"
    return row


def read(path: Path) -> dict[Job, Row]:
    """The rows of a file of JSON lines; of two rows for the same job the later one."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.family, row.network, row.seed): row for row in rows}


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")
