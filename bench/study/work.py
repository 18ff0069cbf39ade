"""The study's jobs: one training each, its stages recorded, on several processes, with a file for what is done."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import taylorkern
from taylorkern.demo.data import digits

from .plan import Plan
from .record import record
from .training import stages

Job = tuple[str, int]  # network, seed
# Files of this folder that a record does not depend on.
NOT_MEASURING = ("summary.py", "pictures.py", "__main__.py")


def all_records(jobs: Sequence[Job], plan: Plan, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The records of all ``jobs``, in their order, made by ``processes`` at once and kept in ``folder``."""
    work = partial(_trained_and_recorded, plan=plan, folder=folder)
    if processes == 1:
        found = list(tqdm(map(work, jobs), total=len(jobs), desc="study", unit="training"))
    else:
        with get_context("spawn").Pool(processes) as pool:
            found = list(tqdm(pool.imap(work, jobs), total=len(jobs), desc="study", unit="training"))
    return [record for records in found for record in records]


def _trained_and_recorded(job: Job, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """The records of one training, one per stage; from their file where the same plan has made it already."""
    network, seed = job
    file = folder / f"{network}-{seed}-{_key(plan)}.json"
    if file.exists():
        return json.loads(file.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = digits()
        trained = stages(network, data, plan.steps, plan.rate, seed)
        records = [record(network, stage, seed, model, plan, data) for stage, model in trained.items()]
    finally:
        torch.set_num_threads(threads)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(records))
    unfinished.replace(file)
    return records


def _key(plan: Plan) -> str:
    """What a record depends on beside its network and seed: the plan, the code, torch."""
    digest = hashlib.sha256(json.dumps(asdict(replace(plan, seeds=0, networks=())), sort_keys=True).encode())
    digest.update(torch.__version__.encode())
    for code in (Path(taylorkern.__file__).parent, Path(__file__).parent):
        for file in sorted(code.rglob("*.py")):
            if file.name not in NOT_MEASURING:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
