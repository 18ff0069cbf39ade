"""The study's jobs: one training each, its stages recorded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taylorkern.demo.data import Digits

from .keeping import Job, Work, all_kept
from .plan import Plan
from .record import record
from .training import stages


def all_records(jobs: Sequence[Job], plan: Plan, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The records of all ``jobs``, one per stage, in their order; see ``keeping``."""
    return [record for records in all_kept(WORK, jobs, plan, folder, processes) for record in records]


def measure(network: str, seed: int, plan: Plan, data: Digits) -> list[dict[str, Any]]:
    """The records of one training."""
    trained = stages(network, data, plan.steps, plan.rate, seed)
    return [record(network, stage, seed, model, plan, data) for stage, model in trained.items()]


WORK = Work(measure, (Path(__file__).parent,), aside=("summary.py", "pictures.py", "__main__.py", "command.py"))
