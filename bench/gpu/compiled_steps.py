"""Piece ``compiled``: training steps under torch.compile, taylorkern's against the plain one's, and both against eager.

All models live side by side, so that what is compared shares its rounds; a way whose compilation fails is told.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from bench import steps as cpu
from bench.gpu.device import Run
from bench.gpu.operations import reason
from bench.gpu.steps import agreeing, forget, references, row, subject, tuned, workloads
from bench.gpu.task import Task
from bench.gpu.timing import stamped
from bench.steps import BY_NAME
from bench.workload import Workload

WAYS = [BY_NAME[name] for name in ("plain", "fused, scored")]
PLAIN, OURS = "compiled plain", "compiled fused, scored"


def run(task: Task) -> None:
    for w in workloads(task)[:2]:  # both batches under AMP
        if task.overdue():
            task.leave(str(subject(w)))
            continue
        task.add(measured(w, task))
        torch.compiler.reset()
        forget()


def measured(w: Workload, task: Task) -> list[dict[str, Any]]:
    """Rows to plain, and one to compiled plain."""
    under = w.compiled("aot_eager" if task.quick else "inductor")
    checks: dict[str, dict[str, float]] = {"plain": {}}
    failed: dict[str, str] = {}
    want, own = references(w)
    with tuned():
        steps: dict[str, Run] = {"plain": BY_NAME["plain"].prepare(w).step}
        for way in WAYS:
            name, start = f"compiled {way.name}", time.perf_counter()
            try:
                ready = replace(way, name=name).prepare(under)
                scores = cpu._first(ready)
            except Exception as refusal:  # whatever the compiler says is its answer
                failed[name] = reason(refusal)
                continue
            checks[name] = {"first step, s": time.perf_counter() - start}
            if way.quantity == "s":
                checks[name] |= agreeing(name, scores, want, own)
            steps[name] = ready.step
        found = stamped(steps, w.pairs, task.device, task.until)
        peaks = {name: task.device.peak(step) for name, step in steps.items()}
    rows = [row(w, name, "plain", found, peaks, checks[name]) for name in steps]
    if {PLAIN, OURS} <= steps.keys():
        rows.append(row(w, OURS, PLAIN, found, peaks, checks[OURS]))
    base = {"suite": "steps", "subject": subject(w), "to": "plain"}
    return rows + [base | {"way": name, "failed": why} for name, why in failed.items()]
