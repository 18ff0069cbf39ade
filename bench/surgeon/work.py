"""The study's jobs: one training each, recorded, on several processes, with a file for what is done."""

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
from bench import study
from bench.study.training import stages
from taylorkern.demo.data import digits

from .plan import Plan
from .record import record

Job = tuple[str, int]  # network, seed
# Files that a record does not depend on, in this folder and in the study's.
NOT_MEASURING = ("summary.py", "tables.py", "pictures.py", "__main__.py", "resnet50.py")


def all_records(jobs: Sequence[Job], plan: Plan, folder: Path, processes: int) -> list[dict[str, Any]]:
    """The records of all ``jobs``, in their order, made by ``processes`` at once and kept in ``folder``."""
    work = partial(_trained_and_recorded, plan=plan, folder=folder)
    if processes == 1:
        return list(tqdm(map(work, jobs), total=len(jobs), desc="sets", unit="network"))
    with get_context("spawn").Pool(processes) as pool:
        return list(tqdm(pool.imap(work, jobs), total=len(jobs), desc="sets", unit="network"))


def _trained_and_recorded(job: Job, plan: Plan, folder: Path) -> dict[str, Any]:
    """The record of one training; from its file where the same plan has made it already."""
    network, seed = job
    file = folder / f"{network}-{seed}-{_key(plan)}.json"
    if file.exists():
        return json.loads(file.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = digits()
        model = list(stages(network, data, plan.steps, plan.rate, seed).values())[-1]
        found = record(network, seed, model, plan, data)
    finally:
        torch.set_num_threads(threads)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(file)
    return found


def _key(plan: Plan) -> str:
    """What a record depends on beside its network and seed: the plan, the code, torch."""
    digest = hashlib.sha256(json.dumps(asdict(replace(plan, seeds=0, networks=())), sort_keys=True).encode())
    digest.update(torch.__version__.encode())
    folders = (Path(taylorkern.__file__).parent, *map(Path, study.__path__), Path(__file__).parent)
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        if file.name not in NOT_MEASURING:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
