"""Means over networks with bootstrap intervals over seeds, and what was asked for beside what was found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.study.summary import over_seeds
from taylorkern.correlation import correlations

from .plan import Plan
from .tuning import TUNED

Record = Mapping[str, Any]
Mean = Mapping[str, Any]  # mean, low, high, networks
INNER = "inner channels"
ALL = "all"
TERMS = ("second", "both")
TRUTHS = ("scored", "held out")


def summarise(records: Sequence[Record], plan: Plan) -> dict[str, Any]:
    """Per group, that is each network and all: the figures of every table and picture."""
    found = {name: _of_group(of, plan) for name, of in groups(records).items()}
    return {"groups": found, "bars": bars(records, found, plan)}


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    names = dict.fromkeys(record["network"] for record in records)
    return {ALL: list(records), **{name: [r for r in records if r["network"] == name] for name in names}}


def _of_group(records: Sequence[Record], plan: Plan) -> dict[str, Any]:
    compared = [record for record in records if "variants" in record]
    pools = dict.fromkeys(pool for r in records for pool in r["curves"])
    return {
        "dense": over_seeds(records, lambda r: r["accuracy"]),
        "curves": {
            pool: _curves([{**r["curves"][pool], "seed": r["seed"]} for r in records if pool in r["curves"]])
            for pool in pools
        },
        "variants": _curves([{**r["variants"], "seed": r["seed"]} for r in compared]),
        "rounds": _curves([{**r["rounds"], "seed": r["seed"]} for r in compared]),
        "rivals": {
            step: _curves([{**r["rivals"][step], "seed": r["seed"]} for r in compared])
            for step in (compared[0]["rivals"] if compared else ())
        },
        "prediction": {
            truth: {
                term: {
                    kind: over_seeds(records, lambda r, t=truth, p=term, k=kind: _agreement(r, p, t)[k])
                    for kind in ("pearson", "spearman")
                }
                for term in TERMS
            }
            for truth in TRUTHS
        },
        "tuning": _tuning(records, plan),
    }


def _curves(records: Sequence[Record]) -> dict[str, dict[str, list[Mean]]]:
    """name → "accuracy" and "flops" → a mean per fraction, over the records that know the name."""
    names = dict.fromkeys(name for record in records for name in record if name != "seed")
    return {
        name: {
            figure: [
                over_seeds(known, lambda r, n=name, f=figure, i=i: r[n][f][i])
                for i in range(len(known[0][name][figure]))
            ]
            for figure in ("accuracy", "flops")
        }
        for name in names
        for known in [[record for record in records if record.get(name)]]
    }


def _agreement(record: Record, term: str, truth: str) -> dict[str, float]:
    import torch

    found = record["prediction"]
    return correlations(torch.tensor([f[truth] for f in found]), torch.tensor([f[term] for f in found]))


def _tuning(records: Sequence[Record], plan: Plan) -> dict[str, Any]:
    count = range(len(plan.epochs))
    accuracy = {
        name: [over_seeds(records, lambda r, n=name, i=i: r["tuning"][n]["accuracy"][i]) for i in count]
        for name in TUNED
    }
    goal = accuracy["taylor_fo"][-1]["mean"]
    return {
        name: {
            "accuracy": means,
            "flops": over_seeds(records, lambda r, n=name: r["tuning"][n]["flops"]),
            "units": over_seeds(records, lambda r, n=name: r["tuning"][n]["units"]),
            "epochs": first_at(goal, [mean["mean"] for mean in means], plan.epochs),
        }
        for name, means in accuracy.items()
    }


def first_at(goal: float, accuracies: Sequence[float], epochs: Sequence[int]) -> int | None:
    """The first of ``epochs`` after which the accuracy is ``goal`` or more; None if it never is.

    >>> first_at(0.9, [0.5, 0.9, 0.8], [0, 1, 2]), first_at(0.95, [0.5, 0.9, 0.8], [0, 1, 2])
    (1, None)
    """
    return next((epoch for epoch, found in zip(epochs, accuracies, strict=True) if found >= goal), None)


def bars(records: Sequence[Record], found: Mapping[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """What the issue asks for: each with the bar, and per group what was found and whether that meets it."""
    rows = [
        _bar(f"dense - surgeon, {_gone(0.5)}", "at most", 0.01, records, _below_dense(plan, 0.5)),
        _bar(f"surgeon - taylor_fo, {_gone(0.7)}", "at least", 0.05, records, _above(plan, "taylor_fo", 0.7)),
        _bar(f"surgeon - taylor_fo, {_gone(0.8)}", "at least", 0.15, records, _above(plan, "taylor_fo", 0.8)),
    ]
    rows += [
        _bar(f"full - blocks, {_gone(fraction)}", "at most", 0.03, records, _above(plan, "surgeon, blocks", fraction))
        for fraction in plan.compared
    ]
    most = plan.epochs[-1] / 2
    reached = {group: of["tuning"]["surgeon"]["epochs"] for group, of in found.items()}
    return [
        *(row for row in rows if row["found"][ALL]["mean"] is not None),
        {
            "asked": f"epochs to taylor_fo's accuracy after {plan.epochs[-1]}",
            "sense": "at most",
            "bar": most,
            "found": reached,
            "met": {group: epoch is not None and epoch <= most for group, epoch in reached.items()},
        },
    ]


def _bar(
    asked: str, sense: str, bar: float, records: Sequence[Record], value: Callable[[Record], float | None]
) -> dict[str, Any]:
    found = {group: over_seeds(of, value) for group, of in groups(records).items()}
    met = {group: SENSES[sense](mean["mean"], bar) for group, mean in found.items() if mean["mean"] is not None}
    return {"asked": asked, "sense": sense, "bar": bar, "found": found, "met": met}


SENSES: dict[str, Callable[[float, float], bool]] = {
    "at most": lambda found, bar: found <= bar,
    "at least": lambda found, bar: found >= bar,
}


def _gone(fraction: float) -> str:
    return f"{fraction:.0%} of {INNER} gone"


def _at(plan: Plan, record: Record, name: str, fraction: float) -> float:
    return record["curves"][INNER][name]["accuracy"][plan.fractions.index(fraction)]


def _below_dense(plan: Plan, fraction: float) -> Callable[[Record], float | None]:
    known = fraction in plan.fractions
    return lambda r: r["accuracy"] - _at(plan, r, "surgeon", fraction) if known else None


def _above(plan: Plan, other: str, fraction: float) -> Callable[[Record], float | None]:
    known = fraction in plan.fractions
    return lambda r: _at(plan, r, "surgeon", fraction) - _at(plan, r, other, fraction) if known else None
