"""The study's tables in Markdown: what was asked for, curves, variants, rivals, predictions, fine-tuning."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .plan import Plan
from .summary import ALL, TERMS, TRUTHS

FORETOLD = {"second": "½ dᵀHd", "both": "G·d + ½ dᵀHd"}


def tables(summary: Mapping[str, Any], plan: Plan) -> str:
    """All of them: the bars and the curves of each group, the rest of all networks together."""
    groups = summary["groups"]
    together = groups[ALL]
    parts = [_bars(summary["bars"]), _dense(groups)]
    for group, found in groups.items():
        for pool, curves in found["curves"].items():
            parts.append(_accuracies(f"{group}, {pool}, rounds of {plan.step:.0%}", curves, plan.fractions))
    parts.append(_accuracies("variants", together["variants"], plan.compared))
    rounds = {f"rounds of {float(step):.0%}": curve for step, curve in together["rounds"].items()}
    parts.append(_accuracies("the surgeon", rounds, plan.compared))
    for step, curves in together["rivals"].items():
        parts.append(_accuracies(f"chosen by, made up by, rounds of {float(step):.0%}", curves, plan.compared))
    parts += [_prediction(groups), *(_tuning(group, found["tuning"], plan) for group, found in groups.items())]
    return "\n\n".join(parts)


def _bars(bars: Sequence[Mapping[str, Any]]) -> str:
    groups = list(bars[0]["found"])
    rows = [["asked for", "bar", *groups]]
    for row in bars:
        cells = [
            f"{entry(row['found'][group])}{'' if row['met'].get(group, True) else ' (missed)'}" for group in groups
        ]
        rows.append([row["asked"], f"{row['sense']} {row['bar']:g}", *cells])
    return markdown(rows)


def _dense(groups: Mapping[str, Any]) -> str:
    return markdown([["", *groups], ["dense", *(entry(found["dense"]) for found in groups.values())]])


def _accuracies(title: str, curves: Mapping[str, Any], fractions: Sequence[float]) -> str:
    rows = [[title, *(f"{fraction:.0%} removed" for fraction in fractions), "networks"]]
    for name, curve in curves.items():
        means = curve["accuracy"]
        rows.append([name, *map(entry, means), str(means[0]["networks"])])
    return markdown(rows)


def _prediction(groups: Mapping[str, Any]) -> str:
    kinds = ("pearson", "spearman")
    columns = [(truth, term, kind) for truth in TRUTHS for term in TERMS for kind in kinds]
    rows = [["foretold ΔL of sets", *(f"{FORETOLD[term]}, {truth}, {kind}" for truth, term, kind in columns)]]
    for group, found in groups.items():
        rows.append([group, *(entry(found["prediction"][truth][term][kind]) for truth, term, kind in columns)])
    return markdown(rows)


def _tuning(group: str, tuning: Mapping[str, Any], plan: Plan) -> str:
    title = f"{group}, cut to {plan.left:.0%} of the FLOPs"
    rows = [[title, "units left", *(f"{epoch} epochs" for epoch in plan.epochs), "epochs needed"]]
    for name, found in tuning.items():
        rows.append([name, entry(found["units"]), *map(entry, found["accuracy"]), entry(found["epochs"])])
    return markdown(rows)


def entry(found: Mapping[str, Any] | int | None) -> str:
    """A mean with its interval, where there is one; a number as it is; "never" for None."""
    if found is None or isinstance(found, int):
        return "never" if found is None else str(found)
    if found["mean"] is None:
        return "-"
    digits = 3 if abs(found["mean"]) < 10 else 0
    if found["low"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def markdown(rows: Iterable[Sequence[str]]) -> str:
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|" + "---|" * (first.count(" | ") + 1), *others])
