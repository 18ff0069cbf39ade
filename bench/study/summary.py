"""Means over networks with bootstrap intervals over seeds, the comparisons the study is about, and its table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from taylorkern.correlation import COEFFICIENTS, interval

from .plan import Plan
from .schedules import COMPARED, SCHEDULES
from .scoring import VARIANTS

Record = Mapping[str, Any]
# What one criterion is expected to have over another.
DIFFERENCES = (
    ("taylor_so", "taylor_fo"),
    ("taylor_so_fisher", "taylor_fo"),
    ("taylor_so", "taylor_so (exact)"),
    ("taylor_so", "taylor_so (mc)"),
)


def summarise(records: Sequence[Record], plan: Plan) -> dict[str, Any]:
    """The figures of every table and picture; intervals are 95 %, of the mean over seeds of the seed's own mean."""
    last = [r for r in records if "iterative" in r]
    return {
        "correlation": {
            "all": _correlation(records),
            **{name: _correlation(of) for name, of in _groups(records).items()},
        },
        "difference": {
            f"{a} - {b}": {
                kind: over_seeds(records, lambda r, a=a, b=b, k=kind: _difference(r, a, b, k)) for kind in COEFFICIENTS
            }
            for a, b in DIFFERENCES
        },
        "by layer": {name: over_seeds(records, lambda r, name=name: _layer_mean(r, name)) for name in VARIANTS},
        "one-shot": _curves(records, "one-shot", plan),
        "iterative": _curves(last, "iterative", plan),
        "schedules": {
            schedule: {
                criterion: {
                    when: over_seeds(last, lambda r, s=schedule, c=criterion, w=when: r["schedules"][s][c][w])
                    for when in ("cut", "trained")
                }
                for criterion in COMPARED
            }
            for schedule in SCHEDULES
        },
        "removed 0.7 of inner channels": _paired_accuracy(records, plan),
    }  # fmt: skip


def over_seeds(records: Iterable[Record], value: Callable[[Record], float | None]) -> dict[str, float | int | None]:
    """Mean of ``value`` over all records, and its interval from one mean per seed."""
    by_seed: dict[int, list[float]] = {}
    for record in records:
        found = value(record)
        if found is not None:
            by_seed.setdefault(record["seed"], []).append(found)
    means = [fmean(values) for values in by_seed.values()]
    if not means:
        return {"mean": None, "low": None, "high": None, "networks": 0}
    low, high = interval(means) if len(means) > 1 else (None, None)
    return {"mean": fmean(means), "low": low, "high": high, "networks": sum(map(len, by_seed.values()))}


def _groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each architecture and of each stage."""
    names = dict.fromkeys([r["network"] for r in records] + [r["stage"] for r in records])
    return {name: [r for r in records if name in (r["network"], r["stage"])] for name in names}


def _correlation(records: Sequence[Record]) -> dict[str, Any]:
    return {
        name: {kind: over_seeds(records, lambda r, n=name, k=kind: _coefficient(r, n, k)) for kind in COEFFICIENTS}
        for name in VARIANTS
    }


def _coefficient(record: Record, name: str, kind: str) -> float | None:
    return record["correlation"][name][kind]


def _layer_mean(record: Record, name: str) -> float | None:
    known = [layer[name] for layer in record["by layer"].values() if layer[name] is not None]
    return fmean(known) if known else None


def _difference(record: Record, a: str, b: str, kind: str) -> float | None:
    both = _coefficient(record, a, kind), _coefficient(record, b, kind)
    return None if None in both else both[0] - both[1]


def _curves(records: Sequence[Record], kind: str, plan: Plan) -> dict[str, Any]:
    """pool → criterion → one mean with interval per fraction."""
    pools = dict.fromkeys(pool for r in records for pool in r[kind])
    names = ["oracle", *VARIANTS]
    curves = {
        pool: {
            name: [
                over_seeds(records, lambda r, p=pool, n=name, i=i: r[kind][p][n][i] if n in r[kind][p] else None)
                for i in range(len(plan.fractions))
            ]
            for name in names
        }
        for pool in pools
    }
    return {pool: {n: c for n, c in found.items() if c[0]["mean"] is not None} for pool, found in curves.items()}


def _paired_accuracy(records: Sequence[Record], plan: Plan) -> dict[str, Any]:
    """taylor_so's accuracy less taylor_fo's on the same networks, one-shot and iterative."""
    if 0.7 not in plan.fractions:
        return {}
    i, pool = plan.fractions.index(0.7), "inner channels"
    groups = {"all": records, **_groups(records)}

    def difference(kind: str, of: Sequence[Record], name: str) -> dict[str, float | int | None]:
        known = [r for r in of if kind in r]
        return over_seeds(known, lambda r: r[kind][pool][name][i] - r[kind][pool]["taylor_fo"][i])

    return {
        kind: {
            name: {group: difference(kind, of, name) for group, of in groups.items()}
            for name in ("taylor_so", "taylor_so_fisher")
        }
        for kind in ("one-shot", "iterative")
    }


def table(summary: Mapping[str, Any], plan: Plan) -> str:
    """The tables of the README, in Markdown."""
    parts = [_bars(summary)]
    for group, criteria in summary["correlation"].items():
        rows = [[f"correlation, {group}", "networks", "Pearson", "Spearman", "Kendall"]]
        for name, found in criteria.items():
            rows.append([name, str(found["pearson"]["networks"]), *(_cell(found[kind]) for kind in COEFFICIENTS)])
        parts.append(_markdown(rows))
    rows = [["within a layer", "Spearman"], *([name, _cell(found)] for name, found in summary["by layer"].items())]
    parts.append(_markdown(rows))
    rows = [["difference", "Pearson", "Spearman", "Kendall"]]
    rows += [[name, *(_cell(found[kind]) for kind in COEFFICIENTS)] for name, found in summary["difference"].items()]
    parts.append(_markdown(rows))
    shown = [i for i, fraction in enumerate(plan.fractions) if fraction in (0.3, 0.5, 0.6, 0.7, 0.8)]
    for kind in ("one-shot", "iterative"):
        for pool, curves in summary[kind].items():
            rows = [[f"{kind}, {pool}", *(f"{plan.fractions[i]:.0%} removed" for i in shown)]]
            rows += [[name, *(_cell(curve[i]) for i in shown)] for name, curve in curves.items()]
            parts.append(_markdown(rows))
    rows = [["schedule", *COMPARED]]
    for schedule, found in summary["schedules"].items():
        for when in ("cut", "trained"):
            rows.append([f"{schedule}, {when}", *(_cell(found[name][when]) for name in COMPARED)])
    parts.append(_markdown(rows))
    return "\n\n".join(parts)


def _bars(summary: Mapping[str, Any]) -> str:
    """What the study was asked to show, beside what it shows."""
    difference, removed = summary["difference"], summary["removed 0.7 of inner channels"]
    so, fisher = difference["taylor_so - taylor_fo"], difference["taylor_so_fisher - taylor_fo"]
    exact = difference["taylor_so - taylor_so (exact)"]
    rows = [
        ["asked for", "bar", "found"],
        ["taylor_so - taylor_fo, Pearson", "at least 0.2", _cell(so["pearson"])],
        ["taylor_so - taylor_fo, Spearman", "at least 0.05", _cell(so["spearman"])],
        ["taylor_so - taylor_so (exact), Pearson", "at least -0.05", _cell(exact["pearson"])],
        ["taylor_so, Spearman", "at least 0.95", _cell(summary["correlation"]["all"]["taylor_so"]["spearman"])],
        ["taylor_so_fisher - taylor_fo, Pearson", "above 0", _cell(fisher["pearson"])],
        ["taylor_so_fisher - taylor_fo, Spearman", "above 0", _cell(fisher["spearman"])],
    ]
    for kind, criteria in removed.items():
        what = f"accuracy, 70 % of inner channels gone, {kind}: taylor_so - taylor_fo"
        rows += [[f"{what}, {group}", "at least 0", _cell(found)] for group, found in criteria["taylor_so"].items()]
    return _markdown(rows)


def _cell(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
