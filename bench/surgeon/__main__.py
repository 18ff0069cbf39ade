"""Sets of channels on scikit-learn's digits: which go, what makes up for them, over architectures and seeds.

    python -m bench.surgeon [--short] [--seeds N] [--out DIR] [--processes N]

Accuracy is that of held-out images, and but for the last table without any fine-tuning. Each network's record is kept
in DIR, and a study that was interrupted goes on from there. The full study writes bench/results/surgeon.json and
docs/surgeon-*.png; a short one, or one of other seeds, writes into DIR only.
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
    parser.add_argument("--out", type=Path, default=ROOT / "study-out/surgeon")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)

    from bench.study.__main__ import _rounded, _versions

    from .pictures import draw
    from .plan import FULL, SHORT
    from .summary import summarise
    from .tables import tables
    from .work import all_records

    plan = SHORT if options.short else FULL
    if options.seeds:
        plan = replace(plan, seeds=options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(network, seed) for seed in range(plan.seeds) for network in plan.networks]
    records = all_records(jobs, plan, options.out, options.processes)
    study = {"plan": asdict(plan), "versions": _versions(), "summary": summarise(records, plan)}
    results, pictures = (ROOT / "bench/results", ROOT / "docs") if plan == FULL else (options.out, options.out)
    (results / "surgeon.json").write_text(json.dumps(_rounded({**study, "networks": records})) + "\n")
    draw(study["summary"], records, plan, pictures)
    print(tables(study["summary"], plan))
    return study


if __name__ == "__main__":
    main()
