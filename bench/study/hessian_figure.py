"""The picture of the Hessian study: curvatures unit by unit, and what the approximations do to ranking and to sets."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from bench.study.hessian import Measured

INK, FAINT = "#2b2d33", "#e6e9ed"
COLOURS = {"exact": "#1f6f8b", "sketch": "#e09f3e", "mc": "#9a8fb5", "fisher": "#c8553d"}
LAYERS = ("#12394a", "#1f6f8b", "#6aa9bd", "#c8553d")
NETWORK = "BN, long"
GROUPS = {"plain\neval": "all plain, eval", "BN\neval": "all BN, eval", "BN\ntrain": "all BN, train"}
WITH_TRUTH = {**GROUPS, "BN\ntrain→eval": "all BN, train→eval"}
CRITERIA = {
    "G²": ("first", "#b9c4d0"),
    "(½H_uu - G)²": ("hessian", INK),
    "(½h - G)², exact": ("exact", COLOURS["exact"]),
    "sketch": ("sketch", COLOURS["sketch"]),
    "mc": ("mc", COLOURS["mc"]),
    "fisher": ("fisher", COLOURS["fisher"]),
}
FORETOLD = {
    "measured": ("measured", "#b9c4d0"),
    "full Hessian": ("full, hessian", INK),
    "full Gauss-Newton": ("full, GGN", "#6aa9bd"),
    "its diagonal, exact h": ("diagonal, exact", COLOURS["exact"]),
    "its diagonal, one sketch": ("diagonal, sketch", COLOURS["sketch"]),
}
CHOSEN = {
    "taylor_fo": ("gone by first", "#b9c4d0"),
    "taylor_so, one sketch": ("gone by sketch", COLOURS["sketch"]),
    "taylor_so, exact": ("gone by exact", COLOURS["exact"]),
    "greedy, full Gauss-Newton": ("gone by greedy GGN", "#6aa9bd"),
}


def draw(found: Mapping[str, Any], first: Mapping[str, "Measured"]) -> Figure:
    """``found`` is the study's summary, ``first`` the first seed's measurements by regime."""
    figures = found["regimes"]
    figure = Figure(figsize=(15, 9), layout="constrained")
    upper, lower = figure.subplots(2, 3)
    by_method(upper[0], first[f"{NETWORK}, eval"])
    by_layer(upper[1], first[f"{NETWORK}, train"])
    methods = {name: (f"error of h, {name}", colour) for name, colour in COLOURS.items()}
    bars(upper[2], figures, GROUPS, methods, ncols=2)
    upper[2].set(yscale="log", ylabel="‖h - diag H‖ / ‖diag H‖", ylim=(1e-2, 40))
    bars(
        lower[0], figures, WITH_TRUTH, {k: (f"spearman of squares, {v}", c) for k, (v, c) in CRITERIA.items()}, ncols=3
    )
    lower[0].set(ylabel="Spearman against the measured (ΔL)²", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
    bars(lower[1], figures, GROUPS, {k: (f"30% {v}", c) for k, (v, c) in FORETOLD.items()})
    lower[1].set_ylabel("ΔL in nats")
    bars(lower[2], figures, WITH_TRUTH, {k: (f"30% {v}", c) for k, (v, c) in CHOSEN.items()})
    lower[2].set_ylabel("measured ΔL in nats")
    titles = (
        "h against the Hessian's diagonal, evaluation mode",
        "The same with batch statistics: exact h, by layer",
        "Error of h, mean over networks and seeds",
        "What it does to the ranking of units",
        "The lowest 30 % by taylor_so, gone together",
        "30 % of the units gone, by what chose them",
    )
    for axes, title in zip([*upper, *lower], titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    return figure


def by_method(axes: Axes, m: "Measured") -> None:
    """h by each method, one minibatch, every unit."""
    for name in ("mc", "sketch", "exact"):
        axes.scatter(_diagonal(m), m.h[name][0], s=16, alpha=0.75, color=COLOURS[name], linewidths=0, label=name)
    _log_square(axes, f"H_uu ({NETWORK}, one minibatch)", "h_u")


def by_layer(axes: Axes, m: "Measured") -> None:
    """Exact h, each layer in its colour: normalisation behind a layer takes back what its gates do."""
    for colour, (layer, units) in zip(LAYERS, m.coupling.layers.items(), strict=True):
        chosen = units[units >= 0]
        label = layer.partition(".")[0]
        axes.scatter(_diagonal(m)[chosen], m.h["exact"][0][chosen], s=16, alpha=0.75, color=colour, label=label)
    _log_square(axes, f"H_uu ({NETWORK}, one minibatch)", "h_u, exact")


def _diagonal(m: "Measured") -> Any:
    return m.hessian[0].diagonal()


def _log_square(axes: Axes, across: str, up: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot((low, high), (low, high), color=INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _tidy(axes, "both")


def bars(
    axes: Axes,
    figures: Mapping[str, Any],
    groups: Mapping[str, str],
    series: Mapping[str, tuple[str, str]],
    ncols: int = 1,
) -> None:
    """A bar with its interval for each of ``series`` (label to figure, colour) in each of ``groups`` (to regime)."""
    wide = 0.84 / len(series)
    for i, (label, (name, colour)) in enumerate(series.items()):
        at = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * wide
        entries = [figures[group][name] for group in groups.values()]
        means = [entry["mean"] for entry in entries]
        axes.bar(at, means, wide * 0.92, color=colour, label=label, yerr=_reach(entries), error_kw={"lw": 0.9})
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=ncols, columnspacing=1)
    _tidy(axes, "y")


def _reach(entries: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """How far each interval goes below and above its mean, [2, groups]; a single seed has none."""
    if any(entry["low"] is None for entry in entries):
        return None
    reach = [(entry["mean"] - entry["low"], entry["high"] - entry["mean"]) for entry in entries]
    return np.maximum(np.array(reach).T, 0)


def _tidy(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color=FAINT, lw=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
