"""A result of the suite as markdown: the short part that stands in README, and all of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.bars import found
from bench.operations import means

Result = dict[str, Any]
Lines = list[str]
UNMEASURED = "–"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Lines:
    return [_row(head), "|" + "---|" * len(head), *map(_row, body)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(q: dict[str, float] | None) -> str:
    """A median with its quartiles.

    >>> spread({"p25": 0.91, "median": 0.934, "p75": 0.95})
    '0.93 (0.91 to 0.95)'
    """
    return f"{q['median']:.2f} ({q['p25']:.2f} to {q['p75']:.2f})" if q else UNMEASURED


def named(subject: dict[str, Any]) -> str:
    """A network as its authors spell it."""
    spelt = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}
    return spelt.get(subject["network"], subject["network"])


def machine(result: Result) -> str:
    of = result["facts"]
    caches = ", ".join(f"{name} {size}" for name, size in of["caches"].items() if "instruction" not in name)
    quick = " A trial with a tiny network: its figures mean nothing." if result["quick"] else ""
    return (
        f"{of['processor']}, cores: {of['cores']}, threads: {of['threads']}, caches: {caches}; {of['vectors']}, torch "
        f"{of['torch']}, Python {of['python']}, {of['date']}. Not measured on a GPU.{quick}"
    )


def bars(result: Result) -> Lines:
    def value(bar: dict[str, Any]) -> str:
        return UNMEASURED if bar["value"] is None else f"{bar['value']:.3f}{bar['unit']}"

    def asked(bar: dict[str, Any]) -> str:
        goal = "" if bar["goal"] is None else f" (goal {bar['goal']:.2f})"
        return f"{bar['limit']:.2f}{bar['unit']}{goal}"

    met = {True: "yes", False: "**no**", None: UNMEASURED}
    body = [(bar["name"], asked(bar), value(bar), met[bar["met"]]) for bar in result["bars"]]
    return table(["", "at most", "measured", "met"], body)


def _subjects(result: Result, suite: str) -> list[dict[str, Any]]:
    return list({str(row["subject"]): row["subject"] for row in result["rows"] if row["suite"] == suite}.values())


def _by_way(result: Result, suite: str, cell: Callable[[dict[str, Any]], str]) -> Lines:
    """Ways down, networks and layouts across; ways that were tried nowhere are left out."""
    subjects = _subjects(result, suite)
    heads = [f"{named(of)} {of['size']}², batch {of['batch']}, {of['layout']}" for of in subjects]
    cells = {(row["way"], str(row["subject"])): cell(row) for row in result["rows"] if row["suite"] == suite}
    ways = list(dict.fromkeys(way for way, _ in cells))
    body = [[way, *(cells.get((way, str(of)), "") for of in subjects)] for way in ways]
    return table(["", *heads], body)


def steps(result: Result) -> Lines:
    return _by_way(result, "steps", lambda row: "failed" if "failed" in row else spread(row["ratio"]))


def memory(result: Result) -> Lines:
    return _by_way(result, "memory", lambda row: f"{row['ratio']:.3f}")


def operations(result: Result) -> Lines:
    found_means = means(result["rows"])
    subjects = dict.fromkeys(key[:3] for key in found_means)
    parts = ("whole", "forward", "backward")

    def cell(key: tuple[str, str, str], part: str) -> str:
        return f"{found_means[*key, part]:.2f}" if (*key, part) in found_means else ""

    body = [[*key, *(cell(key, part) for part in parts)] for key in subjects]
    return table(["operation", "layout", "dtype", "forward and backward", "forward", "backward"], body)


def shapes(result: Result) -> Lines:
    def cells(row: dict[str, Any]) -> list[str]:
        of, moved, share, faults = row["subject"], row["bytes"], row["of copy"], row["faults"]
        return [
            of["operation"],
            of["layout"],
            of["dtype"],
            "x".join(map(str, of["shape"])),
            of["part"],
            spread(row["ratio"]),
            *(f"{moved[whose] / 2**20:.2f}" for whose in ("ours", "eager")),
            *(f"{share[whose]['median']:.2f}" for whose in ("ours", "eager")),
            *(f"{faults[whose]:.0f}" for whose in ("ours", "eager")),
            *(f"{distance:.0e}" for distance in row["checked"].values()),
        ]

    both = [f"{what}: {whose}" for what in ("MiB", "of a copy", "faults", "error") for whose in ("ours", "eager")]
    head = ["operation", "layout", "dtype", "shape", "part", "of eager", *both]
    return table(head, [cells(row) for row in result["rows"] if row["suite"] == "operations"])


def checks(result: Result) -> Lines:
    """What was compared before each way was timed, at worst over networks and layouts, and what a way computes."""
    worst: dict[str, dict[str, float]] = {}
    for row in found(result["rows"], "steps"):
        of = worst.setdefault(row["way"], {})
        for what, distance in row["checked"].items():
            of[what] = max(distance, of.get(what, 0.0))

    def cell(way: str, what: str) -> str:
        distance = worst.get(way, {}).get(what)
        return "" if distance is None else f"{distance:.0e}"

    compared = {"float64": "float64", "float32": "float32", "torch's own": "gates' own, float32", "timed": "timed"}
    body = [
        [way, told["computes"], told["lacks"], *(cell(way, what) for what in compared)]
        for way, told in result["ways"].items()
    ]
    return table(["", "computes", "can't, or costs", *compared.values()], body)


def compilation(result: Result) -> Lines:
    rows = [row for row in found(result["rows"], "steps") if row["way"].startswith("compiled")]
    body = [[row["way"], named(row["subject"]), f"{row['first step']:.0f}"] for row in rows]
    return table(["", "network", "first step, in plain steps"], body)


def failures(result: Result) -> Lines:
    failed = [row for row in result["rows"] if "failed" in row]
    return [
        f"- {row['way']}, {row['subject']['network']}, {row['subject']['layout']}: {row['failed']}" for row in failed
    ]


def pruning(result: Result) -> Lines:
    def cells(row: dict[str, Any]) -> list[str]:
        of, seconds = row["subject"], row["seconds"]
        what = of.get("network", f"{of.get('units', 0):,} units")
        told = [f"{seconds[whose]:.3f}" if whose in seconds else "" for whose in ("taylorkern", "Torch-Pruning")]
        return [of["stage"], what, *told, spread(row["ratio"]) if "ratio" in row else ""]

    rows = [row for row in result["rows"] if row["suite"] == "pruning"]
    return table(["", "", "taylorkern, s", "Torch-Pruning, s", "of Torch-Pruning"], map(cells, rows))


def build(result: Result) -> Lines:
    rows = [row for row in result["rows"] if row["suite"] == "build"]
    return table(
        ["compiling the kernels, cold", "takes"], [[f"in units of {row['to']}", spread(row["ratio"])] for row in rows]
    )


Section = tuple[str, str, Callable[[Result], Lines]]
SHORT: list[Section] = [
    (
        "",
        "What was asked for, and what came out. Operations are forward and backward, in geometric mean over "
        "ResNet-50's shapes at batch 8; the worst is that of all networks and layouts.",
        bars,
    ),
    (
        "",
        "Whole training steps as multiples of the plain one: medians of paired ratios (quartiles). The second row is "
        "the noise: a plain model once more.",
        steps,
    ),
    (
        "",
        "Operations by themselves, scored ours against unscored eager, geometric means over ResNet-50's shapes:",
        operations,
    ),
]
LONG: list[Section] = [
    ("What was asked for", "", bars),
    ("Whole training steps, as multiples of the plain one", "Medians of paired ratios (quartiles).", steps),
    ("What failed", "", failures),
    ("Compilation", "The first step under torch.compile, from an empty cache.", compilation),
    (
        "What each way computes, and what was compared before it was timed",
        "Relative distances, the worst over networks and layouts: in float64 from taylorkern's s (taylorkern's own "
        "from gates that are really multiplied), in float32 from float64; those of the timed models from the timed "
        "gates, where a last bit decides what a ReLU lets through.",
        checks,
    ),
    ("Peak memory of a step, as a multiple of plain's", "Above what is held between steps.", memory),
    ("Operations, geometric means over shapes", "Scored ours against unscored eager.", operations),
    ("Coupling, cutting, ranking", "In seconds, because the bars are: one machine's.", pruning),
    ("Building", "", build),
    (
        "Operations, shape by shape",
        "MiB are those that the code reads and writes, cached or not; of a copy: the speed at which they are moved, as "
        "a share of a copy's in the same round; faults are minor page faults per call; error is the relative distance "
        "from float64, the worst over outputs and gradients.",
        shapes,
    ),
]


def _sections(result: Result, sections: Sequence[Section], level: str) -> Lines:
    lines: Lines = []
    for title, text, make in sections:
        body = make(result)
        if len(body) > (0 if make is failures else 2):
            lines += [*([f"{level} {title}", ""] if title else []), *([text, ""] if text else []), *body, ""]
    return lines


def short(result: Result) -> str:
    """README's part, which names the file of the long one."""
    return "\n".join([f"`make bench` on {machine(result)}", "", *_sections(result, SHORT, "###")]).strip()


def long(result: Result) -> str:
    """Everything that was measured."""
    title = ["# What scoring costs", "", f"`make bench` on {machine(result)}", ""]
    return "\n".join([*title, *_sections(result, LONG, "##")]).strip() + "\n"
