"""What a study measures on one training at a time, on several processes, each result kept in a file as it comes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import taylorkern
from taylorkern.demo.data import Digits, digits

Job = tuple[str, int]  # network, seed


@dataclass(frozen=True)
class Work:
    """``measure`` (network, seed, plan, data) gives plain numbers, by the Python files in ``folders``.

    Of these, ``aside`` names the ones that the numbers don't depend on. ``measure`` must be a module's own function.
    """

    measure: Callable[[str, int, Any, Digits], Any]
    folders: tuple[Path, ...]
    aside: tuple[str, ...]

    def key(self, plan: Any) -> str:
        """What a result depends on beside its network and seed: the plan, the code, torch."""
        digest = hashlib.sha256(json.dumps(asdict(replace(plan, seeds=0, networks=())), sort_keys=True).encode())
        digest.update(torch.__version__.encode())
        for code in (Path(taylorkern.__file__).parent, *self.folders):
            for file in sorted(code.rglob("*.py")):
                if file.name not in self.aside:
                    digest.update(file.read_bytes())
        return digest.hexdigest()[:12]


def all_kept(work: Work, jobs: Sequence[Job], plan: Any, folder: Path, processes: int) -> list[Any]:
    """What ``work`` gives for all ``jobs``, in their order, made by ``processes`` at once and kept in ``folder``."""
    made = partial(_made, work=work, plan=plan, folder=folder)
    if processes == 1:
        return list(tqdm(map(made, jobs), total=len(jobs), unit="training"))
    with get_context("spawn").Pool(processes) as pool:
        return list(tqdm(pool.imap(made, jobs), total=len(jobs), unit="training"))


def _made(job: Job, work: Work, plan: Any, folder: Path) -> Any:
    """The result for one training; from its file where the same plan has made it already."""
    network, seed = job
    file = folder / f"{network}-{seed}-{work.key(plan)}.json"
    if file.exists():
        return json.loads(file.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = work.measure(network, seed, plan, digits())
    finally:
        torch.set_num_threads(threads)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(file)
    return found
