"""The paper's experiments on scikit-learn's digits, over architectures, training stages and seeds.

    python -m bench.study [--short] [--seeds N] [--out DIR] [--processes N]

Each trained network's record is kept in DIR, and a study that was interrupted goes on from there. The full study writes
bench/results/study.json and docs/study-*.png; a short one, or one of other seeds, writes into DIR only.
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
    whole = plan == FULL
    results, pictures = (ROOT / "bench/results", ROOT / "docs") if whole else (options.out, options.out)
    (results / "study.json").write_text(json.dumps(_rounded({**study, "networks": records})) + "\n")
    draw(study["summary"], records, plan, pictures)
    print(table(study["summary"], plan))
    return study


def _rounded(value: Any) -> Any:
    """Figures to five digits: nothing here is known better."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _versions() -> dict[str, str]:
    import torch

    import taylorkern

    return {"taylorkern": taylorkern.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    main()
