"""Cuts the networks of torchvision, timm and transformers at random and compares them with their masked dense selves.

    python -m bench.zoo [--family NAME ...] [--only PATTERN ...] [--seeds N] [--rows FILE] [--resume] [--publish]

Networks are built without weights, in float64, and nothing in them is zero by accident. Each runs in a process of its
own. Rows are appended to FILE as they come; --resume leaves out what has one. --publish makes docs/zoo.md and
bench/results/zoo.json of the rows in FILE, of earlier calls too, once every network has one.
"""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from . import page
from .families import FAMILIES
from .running import Limits, append, jobs, read, run

ROWS = Path(__file__).parents[2] / "build/zoo.jsonl"


def asked(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="of names, such as 'resnet*'")
    parser.add_argument("--seeds", type=int, default=1, help="random cuts per network")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="only networks without a row")
    parser.add_argument("--seconds", type=float, default=240, help="the longest that one network may take")
    parser.add_argument("--gigabytes", type=float, default=16, help="the most that one may allocate")
    parser.add_argument("--publish", action="store_true", help="write the page and the result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = asked(arguments)
    todo = [job for job in jobs(options.family, options.seeds) if any(fnmatch(job[1], p) for p in options.only)]
    known = read(options.rows) if options.resume else {}
    fresh = [job for job in todo if job not in known]
    print(page.HEADER, flush=True)
    for row in run(fresh, Limits(options.seconds, options.gigabytes)):
        append(options.rows, row)
        print(page.line(row), flush=True)
    rows = read(options.rows)
    asked_for = [rows[job] for job in todo]
    print(page.summary(asked_for), file=sys.stderr)
    if options.publish:
        page.publish(list(rows.values()))
    return 0 if all(row.sound for row in asked_for) else 1


if __name__ == "__main__":
    sys.exit(main())
