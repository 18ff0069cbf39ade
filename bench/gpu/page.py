"""A result as Markdown: python -m bench.gpu.page [--results FOLDER] [--into README.md]

The whole page is printed; with --into, README's part of it is put between its markers.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import result
from bench.gpu.bars import rows
from bench.gpu.pieces import PIECES
from bench.gpu.result import Result
from bench.pairs import geometric
from bench.readme import GPU, RESULTS, between
from bench.tables import UNMEASURED, Lines, spread, table
from taylorkern import files

UNMEASURED_YET = "Not yet measured on a GPU: run `make gpu-check` on a machine that has one."


def machine(of: Result) -> Lines:
    piece = of["pieces"].get("facts", {})
    facts, copies = piece.get("facts", {}), piece.get("copies", [])
    told = [
        of["device"],
        *(f"{name} {facts[name]}" for name in ("driver", "cuda", "torch", "triton") if facts.get(name)),
    ]
    told += [f"copy {max(copy['GB/s'] for copy in copies):,.0f} GB/s, reads and writes"] if copies else []
    trial = " A trial: its figures mean nothing." if of["quick"] else ""
    return [f"`make gpu-check` on {', '.join(told)}.{trial}"]


def bars(of: Result) -> Lines:
    def asked(bar: dict[str, Any]) -> str:
        goal = "" if bar["goal"] is None else f" (goal {bar['goal']:.2f})"
        return f"at {'least' if bar['upward'] else 'most'} {bar['limit']:.2f}{goal}"

    met = {True: "yes", False: "**no**", None: UNMEASURED}
    body = [
        (bar["name"], asked(bar), UNMEASURED if bar["value"] is None else f"{bar['value']:.3f}", met[bar["met"]])
        for bar in of["bars"]
    ]
    return table(["", "asked", "measured", "met"], body)


def pieces(of: Result) -> Lines:
    def cells(name: str) -> list[str]:
        part = of["pieces"].get(name)
        if part is None:
            return [name, PIECES[name].shows, "not run", ""]
        told = [part[key] for key in ("why", "not run") if key in part]
        left = part.get("left", [])
        told += [f"left out for want of time: {len(left)}"] if left else []
        return [name, PIECES[name].shows, part["status"], "; ".join([*COUNTED.get(name, _nothing)(part), *told])]

    return table(["", "shows", "", ""], map(cells, PIECES))


def _nothing(part: dict[str, Any]) -> list[str]:
    return []


def _tests(part: dict[str, Any]) -> list[str]:
    ran = [f"{name}: {count} calls" for name, count in part.get("backends", {}).items()]
    return [f"{count} {outcome}" for outcome, count in part.get("outcomes", {}).items()] + ran


def _sanitizer(part: dict[str, Any]) -> list[str]:
    tools = {tool: told for tool, told in part.items() if tool.startswith(("memcheck", "racecheck"))}
    return [
        f"{tool}: {told['found']} found" if "found" in told else f"{tool}: {told['ended']}"
        for tool, told in tools.items()
    ]


def _determinism(part: dict[str, Any]) -> list[str]:
    ran = [row for row in part.get("rows", []) if "different" in row]
    return [f"{len(ran)} cases, {sum(bool(row['different']) for row in ran)} that differ"] if ran else []


def _precision(part: dict[str, Any]) -> list[str]:
    ran = [row for row in part.get("rows", []) if "refused" not in row]
    return [f"{len(ran)} cases, {sum('wrong' in row for row in ran)} beyond twice torch's own error"] if ran else []


def _backends(part: dict[str, Any]) -> list[str]:
    return [
        f"{b['backend']}: {b['why'] if b['serves'] else 'serves nothing, ' + b['why']}"
        for b in part.get("backends", [])
    ]


COUNTED: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "facts": _backends,
    "tests": _tests,
    "sanitizer": _sanitizer,
    "determinism": _determinism,
    "precision": _precision,
}


def operations(of: Result) -> Lines:
    """Geometric means over shapes; a way that lacks one of eager's shapes stands with how many it has."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in rows(of["pieces"], "operations"):
        if "ratio" in row:
            named = row["subject"]
            groups.setdefault((named["operation"], named["layout"], named["dtype"], row["way"]), []).append(row)

    def mean(found: Iterable[dict[str, Any]], what: str) -> str:
        medians = [part[what]["median"] for part in found if what in part]
        return f"{geometric(medians):.2f}" if medians else UNMEASURED

    def graphs(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row["graph"] for row in found]

    def peak(key: tuple[str, str, str, str], found: list[dict[str, Any]]) -> str:
        eagers = {str(row["subject"]): row["peak"] for row in groups.get((*key[:3], "eager"), [])}
        ratios = [row["peak"] / eagers[str(row["subject"])] for row in found if eagers.get(str(row["subject"]))]
        return f"{geometric(ratios):.2f}" if ratios and min(ratios) > 0 else UNMEASURED

    body = [
        [
            *key,
            str(len(found)),
            mean(found, "ratio"),
            mean(graphs(found), "ratio"),
            mean(found, "GB/s"),
            mean(found, "of copy"),
            mean(graphs(found), "of copy"),
            peak(key, found),
        ]
        for key, found in groups.items()
    ]
    head = [
        "operation",
        "layout",
        "dtype",
        "",
        "shapes",
        "of eager",
        "by graph",
        "GB/s",
        "of a copy",
        "by graph",
        "peak",
    ]
    return table(head, body)


def shapes(of: Result) -> Lines:
    def cells(row: dict[str, Any]) -> list[str]:
        named, graph = row["subject"], row["graph"]
        told = [*(str(named[key]) for key in ("operation", "layout", "dtype")), "x".join(map(str, named["shape"]))]
        told += [row["way"], *(spread(at.get(key)) for at in (row, graph) for key in ("ratio", "of copy"))]
        return [*told, f"{row['launching']['median']:.2f}", *(f"{d:.0e}" for d in row["checked"].values())]

    head = ["operation", "layout", "dtype", "shape", "", "of eager", "of a copy", "of eager, graph", "of a copy, graph"]
    head += ["launching", "error", "torch's own"]
    return table(head, map(cells, rows(of["pieces"], "operations")))


LAUNCHES = ("launching", "launched")


def steps(of: Result) -> Lines:
    found = [row for name in ("steps", "compiled") for row in of["pieces"].get(name, {}).get("rows", [])]

    def cells(row: dict[str, Any]) -> list[str]:
        named = row["subject"]
        told = [f"{named['precision']}, batch {named['batch']}", row["way"], row["to"]]
        if "failed" in row:
            return [*told, f"failed: {row['failed']}", *[""] * 3]
        return [*told, spread(row["ratio"]), f"{row['memory']:.3f}", *(f"{row[k]['median']:.2f}" for k in LAUNCHES)]

    return table(["", "", "to", "time", "peak memory", "launching, of its time", "launching"], map(cells, found))


def failures(of: Result) -> Lines:
    """What refused or failed, way by way; how many shapes of an operation."""
    told: dict[tuple[str, ...], int] = {}
    for name in ("operations", "steps", "compiled"):
        for row in of["pieces"].get(name, {}).get("rows", []):
            named, graph = row["subject"], row.get("graph", {})
            where = tuple(
                str(named[key]) for key in ("operation", "layout", "dtype", "precision", "batch") if key in named
            )
            for why in filter(None, (row.get("failed"), f"by graph: {graph['failed']}" if "failed" in graph else None)):
                key = (name, ", ".join(where), row["way"], why)
                told[key] = told.get(key, 0) + 1
    return table(["", "", "", "why", "times"], [[*key, str(count)] for key, count in told.items()])


def chosen(of: Result) -> Lines:
    """How often each backend is the fastest, and by how much in the median."""
    found = [row for row in rows(of["pieces"], "choice") if "backend" in row]
    found.sort(key=_where)
    body = []
    for where, same in itertools.groupby(found, key=_where):
        wins: dict[str, list[float]] = {}
        for row in same:
            wins.setdefault(row["backend"], []).append(row["ratio_to_next"])
        told = (f"{name} {len(of_next)} ({statistics.median(of_next):.2f})" for name, of_next in wins.items())
        body.append([*where, ", ".join(told)])
    return table(["operation", "dtype", "layout", "fastest at so many sizes (of the next)"], body)


def _where(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operation"], row["dtype"], row["layout"]


Section = tuple[str, str, Callable[[Result], Lines]]
SECTIONS: list[Section] = [
    ("What was asked for", "", bars),
    ("Pieces", "", pieces),
    (
        "Operations, forward and backward",
        "Geometric means over ResNet-50's shapes at batch 256, of medians of paired ratios. By events, launches count; "
        "by graph they don't. GB/s are of the bytes that streaming code moves. Peak is memory's, as a multiple of "
        "eager's.",
        operations,
    ),
    (
        "Training steps of ResNet-50",
        "Medians of paired ratios (quartiles). Launching is what the host takes to launch a step: beside the step's "
        "time, and beside what the other takes to launch its own.",
        steps,
    ),
    ("What failed", "", failures),
    ("The fastest backend", "", chosen),
    ("Operations, shape by shape", "", shapes),
]


def whole(of: Result) -> str:
    """The page of one result."""
    return "\n".join(["# What scoring costs on a GPU", "", *machine(of), "", *_sections(of, SECTIONS)]).strip() + "\n"


def ending(of: Result) -> str:
    """For a terminal: all but single shapes, what counts most last."""
    return "\n".join([*_sections(of, SECTIONS[-2::-1]), *machine(of)]).strip()


def _sections(of: Result, sections: Sequence[Section]) -> Lines:
    lines: Lines = []
    for title, text, make in sections:
        body = make(of)
        if len(body) > 2:
            lines += [f"## {title}", "", *([text, ""] if text else []), *body, ""]
    return lines


def section(folder: Path = RESULTS) -> str:
    """README's part: the bars of every device that was measured, or that there is none."""
    found = result.results(folder)
    parts = ["\n".join([*machine(of), "", *bars(of)]) for of in found if not of["quick"]]
    return "\n\n".join(parts) or UNMEASURED_YET


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, metavar="README")
    options = parser.parse_args()
    if options.into:
        files.replace(options.into, between(options.into.read_text(), section(options.results), GPU).encode())
        return
    found = result.results(options.results)
    print("\n".join(map(whole, found)) if found else UNMEASURED_YET)


if __name__ == "__main__":
    main()
