"""The report's pictures, drawn from a run's summary: SVG in need of its page's style, "" for nothing to draw."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from statistics import quantiles
from typing import Any

from .svg import LETTER, Axis, Panel, element, picture, words

WIDTH, RIGHT = 860.0, 836.0
ROW = 22.0
LONGEST = 44  # letters of a layer's name; a longer one is written without its middle

Summary = Mapping[str, Any]


def number(value: object) -> float:
    """A float, NaN for None and for what is no number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def percent(value: object) -> float:
    return 100 * number(value)


def descent(summary: Summary) -> str:
    """Validation accuracy against the FLOPs that are left, round by round, and where the run ended."""
    rounds = [point for point in summary.get("history", ()) if point.get("phase") == "prune"]
    path = [(percent(point.get("flops_kept")), percent(point.get("accuracy"))) for point in rounds]
    end = (percent(summary["ratios"].get("flops")), percent(summary["pruned"].get("accuracy")))
    dense = percent(summary["dense"].get("accuracy"))
    if not any(math.isfinite(x) and math.isfinite(y) for x, y in path):
        return ""
    x = Axis.around([100.0, end[0], *(x for x, _ in path)], RIGHT, 62, 0.03)
    y = Axis.around([dense, end[1], *(y for _, y in path)], 286, 34)
    panel = Panel(x, y)
    parts = [
        panel.frame("FLOPs kept, %", "validation accuracy", " %"),
        panel.level(dense, "dense"),
        panel.curve([path[-1], end], "way"),
        panel.curve(path, "accuracy"),
        panel.dots(path, "accuracy"),
        panel.dots([end], "end", 6),
    ]
    return picture(WIDTH, 330, "Validation accuracy against the FLOPs kept", *parts)


def curves(summary: Summary) -> str:
    """Loss and validation accuracy over the run's steps, its phases shaded."""
    history = summary.get("history", ())
    steps = [number(point.get("step")) for point in history]
    if len(steps) < 2:
        return ""
    x = Axis(min(0.0, *steps), max(1.0, *steps), 62, RIGHT)
    loss, train = ([number(point.get(name)) for point in history] for name in ("loss", "train_loss"))
    accuracy = [percent(point.get("accuracy")) for point in history]
    upper = Panel(x, Axis.around([*loss, *train], 214, 34))
    lower = Panel(x, Axis.around(accuracy, 466, 286))
    panels, phases = (upper, lower), _phases(history)
    told = (
        *(
            panel.shade(*phase[:2], f"shade{turn % 2}", phase[2])
            for panel in panels
            for turn, phase in enumerate(phases)
        ),
        *(upper.below(*phase) for phase in phases),
        upper.frame("", "validation loss, and dotted that of training", marks=False),
        lower.frame("step", "validation accuracy", " %"),
        upper.curve(list(zip(steps, train, strict=True)), "loss train"),
        upper.curve(list(zip(steps, loss, strict=True)), "loss"),
        upper.dots(zip(steps, loss, strict=True), "loss", 2),
        lower.curve(list(zip(steps, accuracy, strict=True)), "accuracy"),
        lower.dots(zip(steps, accuracy, strict=True), "accuracy", 2),
    )
    return picture(WIDTH, 510, "Loss and validation accuracy over the steps of the run", *told)


def _phases(history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """First and last step of every phase, which begins where the one before it ended, and its name."""
    found, first = [], 0.0
    for name, points in groupby(history, lambda point: str(point.get("phase"))):
        last = max(number(point.get("step")) for point in points)
        found.append((first, last, name))
        first = last
    return found


def widths(summary: Summary) -> str:
    """Each layer's width before and after, as a bar within a bar."""
    dense, pruned = (summary.get("widths", {}).get(name, {}) for name in ("dense", "pruned"))

    def bars(x: Axis, name: str, y: float) -> str:
        before, after = dense[name], pruned.get(name, 0)
        return "".join((
            element("rect", x=x.start, y=y - 8, width=x(before) - x.start, height=16, class_="before"),
            element("rect", x=x.start, y=y - 5, width=x(after) - x.start, height=10, class_="after"),
            words(x(before) + 7, y + 4, f"{after:,} of {before:,}", "tick"),
        ))  # fmt: skip

    most = max(dense.values(), default=0)
    return _rows(list(dense), 1.16 * most, "channels", "Width of every layer, before and after", bars)


def ranks(summary: Summary) -> str:
    """Where each layer's units stand among all: least to most, the middle half, the median."""
    layers = {name: sorted(inside) for name, inside in summary.get("ranks", {}).items() if inside}

    def box(x: Axis, name: str, y: float) -> str:
        inside = layers[name]
        low, middle, high = quantiles(inside, n=4, method="inclusive") if len(inside) > 1 else 3 * inside
        told = f"{len(inside)} units: {inside[0]:.2f} to {inside[-1]:.2f}, median {middle:.2f}"
        return element("g", *(
            element("title", told),
            element("line", x1=x(inside[0]), x2=x(inside[-1]), y1=y, y2=y, class_="whisker"),
            element("rect", x=x(low), y=y - 6, width=max(1.0, x(high) - x(low)), height=12, rx=2, class_="box"),
            element("line", x1=x(middle), x2=x(middle), y1=y - 7, y2=y + 7, class_="median"),
        ))  # fmt: skip

    return _rows(list(layers), 1.0, "rank among all units: 0 goes first, 1 last", "Ranks of every layer's units", box)


def _rows(names: Sequence[str], highest: float, below: str, told: str, draw: Callable[[Axis, str, float], str]) -> str:
    """One row per name, which stands on the left; ``draw`` gets the axis, the name and the row's middle."""
    if not names:
        return ""
    left = 24 + LETTER * min(LONGEST, max(map(len, names)))
    x = Axis(0.0, highest or 1.0, max(62, left), RIGHT)
    bottom = 12 + ROW * len(names)
    parts = []
    for value, mark in x.ticks(6).items():
        parts.append(element("line", x1=x(value), x2=x(value), y1=6.0, y2=bottom, class_="grid"))
        parts.append(words(x(value), bottom + 18, mark, "tick", "middle"))
    for row, name in enumerate(names):
        y = 12 + ROW * (row + 0.5)
        half = LONGEST // 2
        written = name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"
        parts += [words(x.start - 10, y + 4, written, "layer", "end"), draw(x, name, y)]
    parts.append(words(RIGHT, bottom + 38, below, "name", "end"))
    return picture(WIDTH, bottom + 46, told, *parts)
