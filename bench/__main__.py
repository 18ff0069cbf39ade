"""Runs the bench suite, prints its tables and keeps them: python -m bench [--quick] [--only PART ...] [--json FILE]

Each part runs in a process of its own, so that one network's memory disturbs no other; what is compared with one
another shares a process. A part whose computation is wrong ends the run, and nothing is kept. With --only the result
is incomplete, and is kept only where --json says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine, tables
from bench.bars import judged
from bench.compiled import compiled
from bench.readme import RESULTS, ROOT
from bench.steps import BY_NAME, COMPILED, rivalled
from bench.workload import QUICK, WHOLE
from taylorkern import files

SUITE = Path(__file__).resolve().parent / "suite.py"
SPIN = {"GOMP_SPINCOUNT": "10000"}  # as in the Makefile: idle threads sleep soon, and leave the core to others
PYTEST = ["--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--benchmark-only", "--benchmark-quiet"]


def parts(quick: bool) -> list[str]:
    """pytest's -k of each process."""
    workloads = QUICK if quick else WHOLE
    return [
        "test_operation",
        *(f"test_step and {w}" for w in workloads),
        *(f"test_heavy and {w}" for w in rivalled(workloads)),
        *(f"test_compiled and {w}" for w in rivalled(workloads)),
        "test_build",
        "test_pruning or test_ranking",
    ]


def run(part: str, quick: bool) -> list[dict[str, Any]]:
    """The rows of one part; raises SystemExit where it fails."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", str(SUITE), *PYTEST, "-k", part, "--rows", str(rows)]
        command += ["--quick"] * quick
        done = subprocess.run(command, cwd=ROOT, env=SPIN | os.environ, text=True, capture_output=True, check=False)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            raise SystemExit(f"{part} failed, so nothing is kept: {' '.join(command)}")
        return json.loads(rows.read_text())


def ways() -> dict[str, dict[str, str]]:
    """What every way of taking a step computes, and what it can't."""
    under = dict.fromkeys(name for names in COMPILED.values() for name in names)
    all_ways = [*BY_NAME.values(), *(compiled(BY_NAME[name]) for name in under)]
    return {way.name: {"computes": way.computes, "lacks": way.lacks} for way in all_ways}


def result(rows: list[dict[str, Any]], quick: bool) -> tables.Result:
    facts = machine.facts()
    kept = {"machine": facts["machine"], "facts": facts, "quick": quick, "ways": ways()}
    return kept | {"bars": judged([] if quick else rows), "rows": rows}  # a tiny network can't meet or miss one


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny network and few rounds, to try the bench itself")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names hold one of these")
    parser.add_argument("--json", type=Path, help="where to keep the result; bench/results/MACHINE.json by default")
    options = parser.parse_args(arguments)
    chosen = [part for part in parts(options.quick) if not options.only or any(o in part for o in options.only)]
    rows: list[dict[str, Any]] = []
    for part in chosen:
        start = time.monotonic()
        rows += run(part, options.quick)
        print(f"{part}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    found = result(rows, options.quick)
    print(tables.long(found))
    whole = not (options.quick or options.only)
    path = options.json or (RESULTS / f"{found['machine']}.json" if whole else None)
    if path:
        files.replace(path, (json.dumps(found, indent=1) + "\n").encode())
        print(f"kept in {path}; python -m bench.readme puts it into README", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
