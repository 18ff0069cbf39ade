"""What the suite is asked to show, and whether it does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.operations import means

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Bar:
    """``value`` of the rows, None where they don't tell, must be at most ``limit``; ``goal`` is what is hoped for."""

    name: str
    limit: float
    value: Callable[[Rows], float | None]
    goal: float | None = None
    unit: str = ""


def operation(name: str, layout: str) -> Callable[[Rows], float | None]:
    return lambda rows: means(rows).get((name, layout, "float32", "whole"))


def found(rows: Rows, suite: str, **wanted: object) -> Iterator[dict[str, Any]]:
    """Rows whose way or subject is as ``wanted``."""
    for row in rows:
        if row["suite"] == suite and "failed" not in row:
            of = row["subject"] | {"way": row["way"]}
            if all(of.get(key) == value for key, value in wanted.items()):
                yield row


def step(network: str, layout: str, way: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        of = found(rows, "steps", network=network, layout=layout, way=way)
        return next((row["ratio"]["median"] for row in of), None)

    return value


def memory(way: str) -> Callable[[Rows], float | None]:
    """The largest ratio over all networks and layouts."""
    return lambda rows: max((row["ratio"] for row in found(rows, "memory", way=way)), default=None)


def beyond_noise(way: str) -> Callable[[Rows], float | None]:
    """How far the median is above the upper quartile of the A/A row, at worst over all networks and layouts."""

    def value(rows: Rows) -> float | None:
        noise = {str(row["subject"]): row["ratio"]["p75"] for row in found(rows, "steps", way="plain again")}
        ways = [row for row in found(rows, "steps", way=way) if str(row["subject"]) in noise]
        return max((row["ratio"]["median"] - noise[str(row["subject"])] for row in ways), default=None)

    return value


def seconds(stage: str, **wanted: object) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        return next((row["seconds"]["taylorkern"] for row in found(rows, "pruning", stage=stage, **wanted)), None)

    return value


OPERATION = "{}, fused and scored, of eager unscored, {}"
BARS = [
    Bar(OPERATION.format(name, layout), limit, operation(name, layout), 0.45)
    for name, layout, limit in (
        ("BN+ReLU", "channels_last", 0.60),
        ("BN+ReLU", "contiguous", 0.75),
        ("BN+add+ReLU", "channels_last", 0.60),
        ("BN+add+ReLU", "contiguous", 0.60),
    )
] + [
    Bar(
        "ResNet-50 step, channels_last, fused and scored, of plain",
        0.92,
        step("resnet50", "channels_last", "fused, scored"),
        0.85,
    ),
    Bar("the same, scored without fusion", 1.00, step("resnet50", "channels_last", "scored")),
    Bar(
        "ResNet-18 step, channels_last, fused and scored, of plain",
        0.97,
        step("resnet18", "channels_last", "fused, scored"),
    ),
    Bar("the same, contiguous", 0.97, step("resnet18", "contiguous", "fused, scored")),
    Bar("peak memory of a scored step of plain, the worst network", 1.00, memory("scored")),
    Bar("peak memory of a fused and scored step of plain, the worst network", 1.00, memory("fused, scored")),
    Bar("converted and unscored above the A/A row's upper quartile, the worst network", 0.0, beyond_noise("converted")),
    Bar("fused and unscored above the A/A row's upper quartile, the worst network", 0.0, beyond_noise("fused")),
    Bar("coupling of densenet201", 1.0, seconds("coupling", network="densenet201"), unit=" s"),
    Bar("cutting half of densenet201", 2.0, seconds("cut", network="densenet201"), unit=" s"),
    Bar("100,000 units folded and ranked", 0.05, seconds("fold and rank", units=100_000), unit=" s"),
]


def judged(rows: Rows) -> list[dict[str, Any]]:
    """Each bar with what was measured, to three digits, and whether it is met; None where it was not measured."""
    verdicts = []
    for bar in BARS:
        value = bar.value(rows)
        value = None if value is None else round(value, 3)
        verdict = {"name": bar.name, "limit": bar.limit, "goal": bar.goal, "unit": bar.unit, "value": value}
        verdicts.append(verdict | {"met": None if value is None else value <= bar.limit})
    return verdicts
