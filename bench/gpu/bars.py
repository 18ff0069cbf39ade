"""What is asked for on a GPU, and whether a result shows it. Times are bars' by events, launches included.

The same figures without launches, from replayed graphs, stand beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.operations import OPERATIONS
from bench.pairs import geometric

Rows = list[dict[str, Any]]
Pieces = dict[str, dict[str, Any]]
Value = Callable[[Pieces], float | None]
MAIN = {"layout": "channels_last", "dtype": "bfloat16"}
AMP = "AMP bfloat16"
OURS = "fused, scored"


@dataclass(frozen=True)
class Bar:
    """``value`` of the pieces, None where they don't tell, is ``limit`` at most, or at least if ``upward``."""

    name: str
    limit: float
    value: Value
    goal: float | None = None
    upward: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.upward else value <= self.limit


def rows(pieces: Pieces, piece: str) -> Rows:
    return [row for row in pieces.get(piece, {}).get("rows", []) if "failed" not in row]


def of_operation(rows: Rows, operation: str, way: str = "ours") -> Iterator[dict[str, Any]]:
    """Rows of the main dtype and layout."""
    for row in rows:
        wanted = MAIN | {"operation": operation}
        if row["way"] == way and row["subject"] | wanted == row["subject"]:
            yield row


def operation(name: str, what: str, graph: bool) -> Value:
    """The geometric mean of medians over an operation's shapes; every shape has to be there."""

    def value(pieces: Pieces) -> float | None:
        found = list(of_operation(rows(pieces, "operations"), name))
        told = [row["graph"] if graph else row for row in found]
        medians = [of[what]["median"] for of in told if what in of]
        return geometric(medians) if len(medians) == len(OPERATIONS[name].shapes) else None

    return value


def step(piece: str, way: str, to: str, batch: int, precision: str = AMP) -> Value:
    return lambda pieces: next(
        (row["ratio"]["median"] for row in _steps(pieces, piece, way, to, precision, batch=batch)), None
    )


def memory(way: str) -> Value:
    """The largest ratio to plain over all workloads."""

    def value(pieces: Pieces) -> float | None:
        found = [row for row in rows(pieces, "steps") if row["way"] == way and row["to"] == "plain"]
        return max((row["memory"] for row in found), default=None)

    return value


def _steps(pieces: Pieces, piece: str, way: str, to: str, precision: str, batch: int) -> Iterator[dict[str, Any]]:
    for row in rows(pieces, piece):
        of = row["subject"]
        if (row["way"], row["to"], of["precision"], of["batch"]) == (way, to, precision, batch):
            yield row


BARS = [
    *(
        Bar(
            f"BN+ReLU, fused and scored, of eager unscored, batch 256, {by}",
            0.62,
            operation("BN+ReLU", "ratio", graph),
            0.45,
        )
        for by, graph in (("by events", False), ("by graphs", True))
    ),
    *(
        Bar(
            f"channel_scores, share of a copy's speed, {by}",
            0.85,
            operation("channel_scores", "of copy", graph),
            upward=True,
        )
        for by, graph in (("by events", False), ("by graphs", True))
    ),
    *(
        bar
        for batch in (256, 128)
        for bar in (
            Bar(
                f"ResNet-50 AMP step, batch {batch}, fused and scored, of plain",
                0.95,
                step("steps", OURS, "plain", batch),
                0.75,
            ),
            Bar(
                "the same, compiled, of compiled plain",
                1.0,
                step("compiled", f"compiled {OURS}", "compiled plain", batch),
            ),
            Bar("the same, scored without fusion", 1.02, step("steps", "scored", "plain", batch)),
        )
    ),
    Bar("peak memory of a fused and scored step of plain, the worst", 1.01, memory(OURS)),
    Bar("peak memory of a scored step of plain, the worst", 1.01, memory("scored")),
]


def judged(pieces: Pieces) -> list[dict[str, Any]]:
    """Each bar with what was measured, to three digits, and whether it is met; None where it was not measured."""
    verdicts = []
    for bar in BARS:
        value = bar.value(pieces)
        value = None if value is None else round(value, 3)
        verdict = {"name": bar.name, "limit": bar.limit, "goal": bar.goal, "upward": bar.upward, "value": value}
        verdicts.append(verdict | {"met": None if value is None else bar.met(value)})
    return verdicts
