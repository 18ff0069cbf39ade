"""Scored and fused batch normalisations against eager ones, forward and backward: ratios that must not grow.

Shared machines are noisy and differ from one another, so the margin is wide, and a ratio only counts as grown if it is
so in every one of a few attempts. It finds what a count of instructions can't: a lost thread, a copy, a page fault.
"""

from pathlib import Path
from typing import Any

import torch

from bench import machine, operations
from bench.guard import baseline
from bench.guard.baseline import UPDATE, NotRunError, Rule
from taylorkern import backends

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "bench" / "results" / "guard-ratios.json"
RULE = Rule("of eager", 0.5, both=False)
PAIRS, ATTEMPTS, BATCH = 15, 3, 8

Case = tuple[str, str, int, int]  # operation, layout, channels, side
CASES: list[Case] = [
    (operation, layout, channels, side)
    for operation, channels, side in (("BN+ReLU", 64, 56), ("BN+ReLU", 256, 14), ("BN+add+ReLU", 512, 28))
    for layout in operations.LAYOUTS
]


def name(case: Case) -> str:
    operation, layout, channels, side = case
    return f"{operation} {layout} {BATCH}x{channels}x{side}x{side}"


def measured(case: Case, pairs: int = PAIRS) -> float:
    """The median of ours to eager, after both have been compared with float64."""
    operation, layout, channels, side = case
    rows = operations.measured(operation, layout, "float32", (BATCH, channels, side, side), pairs)
    (whole,) = (row for row in rows if row["subject"]["part"] == "whole")
    return whole["ratio"]["median"]


def check() -> list[str]:
    """What is wrong, line by line, in every one of some attempts; raises NotRunError where nothing can be compared."""
    _require_kernels()
    known = baseline.read(FILE).get("baseline", {})
    if not known:
        raise NotRunError(f"there is no baseline; {UPDATE} records one")
    best = {name(case): measured(case) for case in CASES}
    for _ in range(ATTEMPTS - 1):
        again = [case for case in CASES if name(case) in RULE.complaints(best, known)]
        best |= {name(case): min(best[name(case)], measured(case)) for case in again}
    return list(RULE.complaints(best, known).values())


def update() -> str:
    """Record this machine's ratios as the baseline. Returns what was done."""
    _require_kernels()
    found = {name(case): round(measured(case), 3) for case in CASES}
    content: dict[str, Any] = {
        "unit": RULE.unit,
        "margin": RULE.margin,
        "recorded on": machine.facts(),
        "baseline": found,
    }
    baseline.write(FILE, content)
    return f"{len(found)} ratios recorded in {FILE.relative_to(ROOT)}"


def _require_kernels() -> None:
    if backends.provider("batch_norm_act", torch.empty(1, 1, 1, 1)) is not backends.native:
        raise NotRunError("the CPU kernels can't be had here; `taylorkern doctor` says why")
