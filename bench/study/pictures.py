"""The study's pictures: correlations, accuracy against what was removed, schedules, ranks before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .plan import Plan
from .schedules import COMPARED, SCHEDULES
from .scoring import VARIANTS

INK, FAINT, GREY = "#2b2d33", "#e6e9ed", "#a9b1bb"
# The criteria that the pictures are about have a colour; the others are grey, told apart by their line.
COLOURS = {
    "oracle": INK,
    "taylor_fo": "#c8553d",
    "taylor_so": "#1f6f8b",
    "taylor_so (exact)": "#7fb3c4",
    "taylor_so_fisher": "#4f9d69",
    "taylor_weight": "#b08bbb",
    "magnitude": "#d9a441",
}
PLAIN = [name for name in VARIANTS if name not in COLOURS]
DASHES = {name: ("--", ":", "-.", (0, (1, 3)), (0, (6, 2)))[i % 5] for i, name in enumerate(PLAIN)}


def draw(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], plan: Plan, folder: Path) -> None:
    """Write the four ``study-*.png`` into ``folder``."""
    figures = {
        "correlation": correlation(summary, records),
        "removal": removal(summary, plan),
        "schedules": schedules(summary, plan),
        "ranks": ranks([r for r in records if "ranks" in r and r["seed"] == 0]),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"study-{name}.png", dpi=110, facecolor="white")


def correlation(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Figure:
    """One dot per network, and the mean with its interval, for Pearson's and Spearman's coefficient."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    names = list(VARIANTS)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("pearson", "spearman"), strict=True):
        for row, name in enumerate(names):
            dots = [r["correlation"][name][kind] for r in records]
            dots = [dot for dot in dots if dot is not None]
            spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(dots))
            colour = COLOURS.get(name, GREY)
            axes.scatter(dots, row + spread, s=9, color=colour, alpha=0.35, lw=0)
            mean = summary["correlation"]["all"][name][kind]
            if mean["low"] is not None:
                axes.plot([mean["low"], mean["high"]], [row, row], color=INK, lw=2.2, solid_capstyle="butt")
                axes.plot(mean["mean"], row, "o", ms=7, color=colour, mec=INK)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(f"{kind.capitalize()}'s coefficient with the measured (ΔL)²")
        _tidy(axes)
    axes.invert_yaxis()
    figure.suptitle(
        f"Criteria against the oracle: {len(records)} networks, means with 95 % intervals over seeds", fontsize=11
    )
    return figure


def removal(summary: Mapping[str, Any], plan: Plan) -> Figure:
    """Accuracy without fine-tuning against the channels removed: at once above, round by round below."""
    panels = [("one-shot", pool) for pool in summary["one-shot"]] + [
        ("iterative", pool) for pool in summary["iterative"]
    ]
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True).flatten()
    for axes, (kind, pool) in zip(grid, panels, strict=False):
        for name, curve in summary[kind][pool].items():
            style = {"lw": 1.9, "ls": "-"} if name in COLOURS else {"lw": 1.1, "ls": DASHES[name]}
            means = [point["mean"] for point in curve]
            axes.plot(plan.fractions, means, color=COLOURS.get(name, GREY), label=name, **style)
        stages = "all stages" if kind == "one-shot" else "last stage"
        axes.set_title(f"{kind}, {pool} ({stages})", loc="left", fontsize=10)
        axes.set_xlabel("channels removed")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _tidy(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    grid[-1].axis("off")
    grid[-1].legend(handles, labels, frameon=False, fontsize=9, ncols=2, loc="center")
    grid[0].set_ylabel("held-out accuracy, no fine-tuning")
    grid[3].set_ylabel("held-out accuracy, no fine-tuning")
    return figure


def schedules(summary: Mapping[str, Any], plan: Plan) -> Figure:
    """Accuracy right after the last cut and after the rest of the training budget, for each schedule and criterion."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, when in zip(figure.subplots(1, 2), ("cut", "trained"), strict=True):
        for i, name in enumerate(COMPARED):
            points = [summary["schedules"][schedule][name][when] for schedule in SCHEDULES]
            x = np.arange(len(points)) + (i - (len(COMPARED) - 1) / 2) * 0.13
            mean = np.array([point["mean"] for point in points])
            ends = [
                [point["mean"] if end is None else end for end in (point["low"], point["high"])] for point in points
            ]
            reach = np.abs(np.array(ends).T - mean)
            axes.errorbar(x, mean, reach, fmt="o", ms=5, lw=1.4, color=COLOURS.get(name, GREY), label=name)
        axes.set_xticks(range(len(SCHEDULES)), list(SCHEDULES))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        titles = {"cut": "right after the last cut", "trained": f"after {plan.budget} minibatches of training in all"}
        axes.set_title(titles[when], loc="left", fontsize=10)
        _tidy(axes)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    figure.suptitle(f"Held-out accuracy with {plan.left:.0%} of the channels left", fontsize=11)
    return figure


def ranks(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Where each layer's units stand among all by taylor_so, before and after the less important half is removed."""
    figure = Figure(figsize=(12, 3.6 * max(1, len(records))), layout="constrained")
    rows = figure.subplots(max(1, len(records)), 2, squeeze=False, sharey=True)
    for row, record in zip(rows, records, strict=True):
        for axes, when in zip(row, ("before", "after"), strict=True):
            layers = record["ranks"][when]
            boxes = axes.boxplot(list(layers.values()), widths=0.6, patch_artist=True, medianprops={"color": INK})
            for box in boxes["boxes"]:
                box.set(facecolor="#cfe3ea" if when == "before" else "#1f6f8b", edgecolor=INK)
            axes.set_xticks(range(1, len(layers) + 1), list(layers), rotation=45, ha="right", fontsize=8)
            axes.set_title(f"{record['network']}, {when} half of the units went", loc="left", fontsize=10)
            _tidy(axes)
        row[0].set_ylabel("rank (0 least important, 1 most)")
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
