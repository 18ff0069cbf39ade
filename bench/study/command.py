"""The command line of a study, and where what it has found goes."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Study:
    """``name`` is that of its JSON file; plan, records and summary are the study's own."""

    name: str
    full: Any
    short: Any
    records: Callable[..., list[dict[str, Any]]]  # of jobs, plan, folder, processes
    summarise: Callable[..., dict[str, Any]]  # of records, plan
    draw: Callable[..., None]  # of summary, records, plan, folder
    table: Callable[..., str]  # of summary, plan


def asked(arguments: Sequence[str] | None, text: str | None, out: Path) -> argparse.Namespace:
    """The options of a study that ``text`` describes, by default with its files in ``out``."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one architecture, two seeds, barely trained")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args(arguments)


def carry_out(study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """Do it, write the result and the pictures, print the table. Only the full plan writes into the repository."""
    plan = study.short if options.short else study.full
    if options.seeds:
        plan = replace(plan, seeds=options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(network, seed) for seed in range(plan.seeds) for network in plan.networks]
    records = study.records(jobs, plan, options.out, options.processes)
    found = {"plan": asdict(plan), "versions": _versions(), "summary": study.summarise(records, plan)}
    whole = plan == study.full
    results, pictures = (ROOT / "bench/results", ROOT / "docs") if whole else (options.out, options.out)
    (results / f"{study.name}.json").write_text(json.dumps(_rounded({**found, "networks": records})) + "\n")
    study.draw(found["summary"], records, plan, pictures)
    print(study.table(found["summary"], plan))
    return found


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
