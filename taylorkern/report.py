"""Pictures: a pruning run's way down, widths and scores, and importances against what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

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
    axes.set_xlabel(f"importance ({summary['ranked_by']}); low goes first")
    told = "Scores per layer before the first cut: every channel, middle half, median"
    axes.set_title(told, loc="left", fontsize=11, color=INK)
    _tidy(axes, grid="x")
    return figure


def scatter(network: Mapping[str, Any]) -> Figure:
    """One panel per criterion: each unit's importance against its measured (ΔL)², coloured by its first layer.

    ``network`` is one of the "networks" of ``taylorkern.comparison.compare``. What is zero lies on the axis.
    """
    names = list(network["importance"])
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.9, 2.95 * rows + 0.75), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    truth, depth = _floats(network["truth"]), _first_layer(network)
    shades = ScalarMappable(Normalize(0, max(1, len(network["layers"]) - 1)), "viridis")
    for axes, name in zip(panels.flat, names, strict=False):
        _cloud(axes, _floats(network["importance"][name]), truth, shades.to_rgba(depth))
        told = network["correlation"]["all"][name]
        axes.set_title(name, loc="left", fontsize=10.5, color=INK, pad=16)
        coefficients = "   ".join(f"{kind.capitalize()} {_told(told[kind])}" for kind in told)
        axes.text(0, 1.03, coefficients, transform=axes.transAxes, fontsize=7.2, color=INK)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    bar = figure.colorbar(shades, ax=panels, shrink=0.4, aspect=30, pad=0.01)
    bar.set_ticks([0, max(1, len(network["layers"]) - 1)], labels=["first", "last"])
    bar.set_label("layer", labelpad=-12)
    bar.outline.set_visible(False)
    figure.supxlabel("importance", fontsize=10, color=INK)
    figure.supylabel("measured (ΔL)²", fontsize=10, color=INK)
    figure.suptitle(
        f"{network['model']}, seed {network['seed']}: {len(truth)} units, {network['minibatches']} minibatches",
        x=0.01, ha="left", fontsize=11, color=INK,
    )  # fmt: skip
    return figure


def _cloud(axes: Axes, importance: np.ndarray, truth: np.ndarray, colours: np.ndarray) -> None:
    """Log against log; what can't be drawn there is left out, but for zeros, which are put at the least value."""
    drawn = np.isfinite(importance) & np.isfinite(truth)
    x, y = (np.maximum(values[drawn], _least(values[drawn])) for values in (importance, truth))
    if not len(x):
        axes.text(0.5, 0.5, "no unit to draw", transform=axes.transAxes, ha="center", fontsize=8, color=INK)
        axes.set(xticks=[], yticks=[])
        return
    axes.scatter(x, y, s=9, c=colours[drawn], alpha=0.75, linewidths=0)
    axes.set(xscale="log", yscale="log")
    for axis, values in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
        if values.max() < 30 * values.min():  # hardly a power of ten in it
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=7.5)
    _tidy(axes, grid="both")


def _least(values: np.ndarray) -> float:
    return min(values[values > 0], default=1.0)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _first_layer(network: Mapping[str, Any]) -> np.ndarray:
    """For each unit the number of the first layer it has a place in."""
    depth = np.zeros(len(network["units"]))
    for number, positions in reversed(list(enumerate(network["layers"].values()))):
        depth[positions] = number
    return depth


def _told(coefficient: float | None) -> str:
    return "–" if coefficient is None else f"{coefficient:.2f}"


def _tidy(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, color=FAINT, lw=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
