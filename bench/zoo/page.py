"""docs/zoo.md and bench/results/zoo.json, from the rows."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .examination import TOLERANCE, Row
from .families import FAMILIES

ROOT = Path(__file__).parents[2]
COLUMNS = ["network", "units", "units free", "channels free", "what froze the rest", "removed", "result"]
HEADER = f"| {' | '.join([*COLUMNS, 'couple s', 'cut s'])} |\n|{'---|' * (len(COLUMNS) + 2)}"
SUMMARY = "| family | networks | cut and equal | at least half of the units free | refused by name | differ | failed |"
NAMED = 3  # operations per row

TEXT = """# The zoo

Every network here is cut by 30 % of its units, drawn at random, and compared with its dense self in which the weights
that read the removed units are zero: in float64, on other inputs than it was cut with, over all of its outputs. Equal
means a relative difference of at most {tolerance:.0e}. A network of which nothing can be cut counts as refused by
name: the operations that stop it stand in its row.

None has trained weights: constants, such as normalisation statistics and the scales of branches that start at zero,
are drawn at random so that every branch is seen. Units free is the share of the sets of channels that go together
which can be cut (those that can't go together only where what is computed with them says so); channels free is that of
all layers' output channels, where a stream that many layers write to or normalise counts once for each. What froze the
rest names operations, the line that calls them and how many channels they touch, the network's own inputs and outputs
apart. Times are of a machine that did other things meanwhile. This page is written by `make zoo`.

{summary}
"""


def line(row: Row) -> str:
    columns = [
        row.network + (f" (seed {row.seed})" if row.seed else ""),
        str(row.units),
        f"{row.free_units:.0%}",
        f"{row.free_channels:.0%}",
        _frozen_by(row),
        str(row.removed),
        _result(row),
        f"{row.couple_s:.1f}",
        f"{row.cut_s:.1f}",
    ]
    return f"| {' | '.join(column.replace('|', '/') for column in columns)} |"


def _frozen_by(row: Row) -> str:
    named = [f"{operation}{f' ({line})' if line else ''}: {n}" for operation, line, n in row.frozen_by[:NAMED]]
    more = len(row.frozen_by) - NAMED
    return ", ".join(named).replace("aten.", "").replace(".default", "") + (f" and {more} more" if more > 0 else "")


def _result(row: Row) -> str:
    words = {"equal": f"{row.error or 0:.0e}", "differs": f"DIFFERS by {row.error or 0:.0e}", "nothing": "nothing cut"}
    words |= {"refused": f"refused: {row.note}", "failed": f"FAILED at {row.stage}: {row.note}"}
    return words[row.result]


def summary(rows: Iterable[Row]) -> str:
    """A line per family."""
    lines = [SUMMARY, "|" + "---|" * 7]
    rows = list(rows)
    for family in FAMILIES:
        of_family = [row for row in rows if row.family == family]
        if of_family:
            lines.append(_counts(family, of_family))
    return "\n".join(lines)


def _counts(family: str, rows: list[Row]) -> str:
    def count(*results: str) -> int:
        return sum(row.result in results for row in rows)

    half = sum(row.result == "equal" and row.free_units >= 0.5 for row in rows)
    shares = [f"{n} ({n / len(rows):.0%})" for n in (count("equal"), half)]
    rest = [str(count(*results)) for results in (("refused", "nothing"), ("differs",), ("failed",))]
    return f"| {' | '.join([family, str(len(rows)), *shares, *rest])} |"


def publish(rows: list[Row]) -> None:
    """Write the page and the result; only of all networks at once."""
    found = {(row.family, row.network) for row in rows}
    lacking = [name for family, its in FAMILIES.items() for name in its.names() if (family, name) not in found]
    if lacking:
        raise SystemExit(f"no row yet for {', '.join(lacking)}: run them with --resume first")
    (ROOT / "bench/results/zoo.json").write_text(_json(rows))
    (ROOT / "docs/zoo.md").write_text(text(rows))


def text(rows: list[Row]) -> str:
    parts = [TEXT.format(tolerance=TOLERANCE, summary=summary(rows))]
    for family, source in FAMILIES.items():
        order = {name: i for i, name in enumerate(source.names())}
        of_family = [row for row in rows if row.family == family and row.network in order]
        of_family.sort(key=lambda row: (order[row.network], row.seed))
        parts.append("\n".join([f"## {family}\n", source.about(), "", HEADER, *map(line, of_family)]) + "\n")
    return "\n".join(parts)


def _json(rows: list[Row]) -> str:
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"
