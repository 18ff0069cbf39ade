"""The study's jobs: one training each, its last stage recorded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import study
from bench.study.keeping import Job, Work, all_kept
from bench.study.training import stages
from taylorkern.demo.data import Digits

from .plan import Plan
from .record import record


def all_records(jobs: Sequence[Job], plan: Plan, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The records of all ``jobs``, in their order; see ``bench.study.keeping``."""
    return all_kept(WORK, jobs, plan, folder, processes)


def measure(network: str, seed: int, plan: Plan, data: Digits) -> dict[str, Any]:
    """The record of one training."""
    model = list(stages(network, data, plan.steps, plan.rate, seed).values())[-1]
    return record(network, seed, model, plan, data)


WORK = Work(
    measure,
    (*map(Path, study.__path__), Path(__file__).parent),
    aside=("summary.py", "tables.py", "pictures.py", "__main__.py", "command.py", "resnet50.py"),
)
