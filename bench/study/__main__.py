"""The paper's experiments on scikit-learn's digits, over architectures, training stages and seeds.

    python -m bench.study [--short] [--seeds N] [--out DIR] [--processes N]

Each trained network's record is kept in DIR, and a study that was interrupted goes on from there. A full study writes
bench/results/study.json and docs/study-*.png; a short one writes into DIR only.
"""

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one architecture, two seeds, barely trained")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on")
    parser.add_argument("--out", type=Path, default=ROOT / "study-out")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)

    from .pictures import draw
    from .plan import FULL, SHORT
    from .summary import summarise, table
    from .work import all_records

    plan = SHORT if options.short else FULL
    if options.seeds:
        plan = replace(plan, seeds=options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(network, seed) for seed in range(plan.seeds) for network in plan.networks]
    records = all_records(jobs, plan, options.out, options.processes)
    study = {"plan": asdict(plan), "versions": _versions(), "summary": summarise(records, plan)}
    results, pictures = (options.out, options.out) if options.short else (ROOT / "bench/results", ROOT / "docs")
    (results / "study.json").write_text(json.dumps({**study, "networks": _compact(records)}, indent=1) + "\n")
    draw(study["summary"], records, plan, pictures)
    print(table(study["summary"], plan))
    return study


def _compact(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One network's figures without its curves and ranks, which the summary and the pictures hold."""
    kept = ("network", "stage", "seed", "units", "loss", "accuracy", "correlation")
    return [{key: record[key] for key in kept} for record in records]


def _versions() -> dict[str, str]:
    import torch

    import taylorkern

    return {"taylorkern": taylorkern.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    main()
