"""Puts a result of the suite into README, between its markers, and beside the JSON as a page of tables.

    python -m bench.readme [--machine NAME] [--readme README.md] [--check]

The newest result in bench/results is taken unless one is named. With --check nothing is written: it says what is out
of date and exits with 1.
"""

import argparse
import json
import sys
from pathlib import Path

from bench import picture, tables
from taylorkern import files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
GPU = ("<!-- gpu -->", "<!-- /gpu -->")


def results(folder: Path) -> dict[str, tables.Result]:
    """What the suite has left in ``folder``, by machine; other files there are not its."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in read.items() if isinstance(result, dict) and result.get("machine") == name}


def newest(folder: Path) -> str:
    """Raises SystemExit where there is none."""
    found = results(folder)
    if not found:
        raise SystemExit(f"no result of the suite in {folder}: run make bench")
    return max(found, key=lambda name: found[name]["facts"]["date"])


def between(text: str, new: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with ``new`` between the markers; raises SystemExit where they are missing.

    >>> between("a <!-- bench --> old <!-- /bench --> z", "new")
    'a <!-- bench -->\\nnew\\n<!-- /bench --> z'
    """
    first, last = markers
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"README has no markers {first} and {last}: put them where the tables shall stand")
    return f"{before}{first}\n{new}\n{last}{after}"


def section(result: tables.Result) -> str:
    page = f"bench/results/{result['machine']}.md"
    links = [
        f"![Whole training steps as multiples of the plain one]({picture.SHOWN_AT})",
        "",
        f"Every way with what it computes and can't, peak memory, every shape: [{page}]({page}).",
    ]
    return "\n".join([tables.short(result), "", *links])


def written(result: tables.Result, readme: Path, folder: Path) -> dict[Path, str]:
    """What README and the page have to say."""
    page = folder / f"{result['machine']}.md"
    return {readme: between(readme.read_text(), section(result)), page: tables.long(result)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="whose result; the newest by default")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=ROOT / picture.SHOWN_AT)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    result = results(options.results)[options.machine or newest(options.results)]
    wanted = written(result, options.readme, options.results)
    stale = [str(path) for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    stale += [] if picture.shows(options.picture, result) else [str(options.picture)]
    if options.check:
        for name in stale:
            print(f"{name} is not what {result['machine']}.json says: run python -m bench.readme", file=sys.stderr)
        return 1 if stale else 0
    for path, text in wanted.items():
        files.replace(path, text.encode())
    picture.draw(result, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
