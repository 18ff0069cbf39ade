"""Pictures of a pruning run, drawn from its summary: the way down, the widths, the scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

DENSE, PRUNED, LOSS, INK, FAINT = "#b9c4d0", "#1f6f8b", "#c8553d", "#2b2d33", "#e6e9ed"


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Write ``trajectory.png``, ``widths.png`` and ``scores.png`` of the demo's summary into ``folder``."""
    pictures = {"trajectory": trajectory, "widths": widths, "scores": scores}
    for name, picture in pictures.items():
        picture(summary).savefig(folder / f"{name}.png", dpi=120, facecolor="white")


def trajectory(summary: Mapping[str, Any]) -> Figure:
    """Held-out accuracy and loss against the channels left, while pruning goes on, and after fine-tuning."""
    history, dense, pruned = summary["history"], summary["dense"], summary["pruned"]
    channels = [point["channels"] for point in history]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, key, colour in ((upper, "accuracy", PRUNED), (lower, "loss", LOSS)):
        path = [point[key] for point in history]
        axes.plot(channels, path, "o-", ms=4, lw=1.6, color=colour, label="while pruning")
        axes.axhline(dense[key], color=INK, lw=1, ls=(0, (4, 3)), label="dense network")
        axes.plot(channels[-1], pruned[key], "*", ms=15, color=colour, mec="white", label="fine-tuned")
        axes.set_ylabel(f"held-out {key}")
        axes.legend(frameon=False, fontsize=9, loc="lower left" if key == "accuracy" else "upper left")
        _tidy(axes)
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    told = (
        f"{channels[0]} to {channels[-1]} channels: {summary['ratios']['flops']:.0%} of the FLOPs, "
        f"{summary['ratios']['latency_ms']:.0%} of the latency, "
        f"accuracy {dense['accuracy']:.2%} to {pruned['accuracy']:.2%}"
    )
    upper.set_title(told, loc="left", fontsize=11, color=INK)
    lower.set_xlabel("prunable channels left")
    lower.invert_xaxis()
    return figure


def widths(summary: Mapping[str, Any]) -> Figure:
    """Each convolution's output channels before and after."""
    before, after = summary["widths"]["dense"], summary["widths"]["pruned"]
    rows = np.arange(len(before))
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(before)), layout="constrained")
    axes = figure.subplots()
    axes.barh(rows, list(before.values()), height=0.72, color=DENSE, label="dense")
    axes.barh(rows, list(after.values()), height=0.44, color=PRUNED, label="pruned")
    for row, name in enumerate(before):
        told = f"  {after[name]} of {before[name]}"
        axes.text(before[name], row, told, va="center", fontsize=8.5, color=INK)
    axes.set_yticks(rows, list(before), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(before.values()))
    axes.set_xlabel("output channels")
    axes.set_title("Width of every convolution, before and after", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    _tidy(axes, grid="x")
    return figure


def scores(summary: Mapping[str, Any]) -> Figure:
    """The distribution of the channels' importances in each layer, just before the first cut."""
    layers = summary["importance"]
    positive = [value for values in layers.values() for value in values if value > 0]
    floor = min(positive, default=1.0)
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(8, 1.6 + 0.34 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(layers.values()):
        clipped = np.maximum(values, floor)
        axes.scatter(clipped, row + rng.uniform(-0.28, 0.28, len(clipped)), s=7, alpha=0.45, color=PRUNED, linewidths=0)
        low, middle, high = np.quantile(clipped, (0.25, 0.5, 0.75))
        axes.plot((low, high), (row, row), color=INK, lw=3, solid_capstyle="round", alpha=0.75)
        axes.plot(middle, row, "o", ms=6, color="white", mec=INK)
    axes.set_xscale("log")
    axes.set_yticks(range(len(layers)), list(layers), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"importance ({summary['plan']['criterion']}); low goes first")
    told = "Scores per layer before the first cut: every channel, middle half, median"
    axes.set_title(told, loc="left", fontsize=11, color=INK)
    _tidy(axes, grid="x")
    return figure


def _tidy(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, color=FAINT, lw=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
