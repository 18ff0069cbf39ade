"""The study's pictures: curves, variants and rivals, predictions, fine-tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bench.study.pictures import COLOURS, GREY, INK, _tidy

from .plan import Plan
from .prediction import CHOSEN_BY
from .summary import ALL, INNER
from .ways import COMPENSATED

TEAL = "#12866f"
OWN = {
    "surgeon": TEAL,
    "taylor_fo": COLOURS["taylor_fo"],
    "taylor_so": COLOURS["taylor_so"],
    "taylor_so_fisher": "#7b62a8",
    "magnitude": COLOURS["magnitude"],
    "bn_scale": "#8c6d4f",
    "random": GREY,
}
VARIED = {
    "surgeon, blocks": ":",
    "surgeon, Fisher rows": "-.",
    "surgeon, per whole cost": ":",
    "surgeon, whatever the cost": "-.",
}
BANDED = ("surgeon", "taylor_fo")


def draw(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], plan: Plan, folder: Path) -> None:
    """Write the four ``surgeon-*.png`` into ``folder``."""
    figures = {
        "curves": curves(summary, plan),
        "variants": variants(summary, plan),
        "prediction": prediction(records),
        "tuning": tuning(summary, plan),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"surgeon-{name}.png", dpi=110, facecolor="white")


def curves(summary: Mapping[str, Any], plan: Plan) -> Figure:
    """Accuracy against what went of the inner channels, above by channels and below by FLOPs, for each network."""
    groups = {name: found for name, found in summary["groups"].items() if name != ALL}
    figure = Figure(figsize=(4.2 * len(groups) + 2.6, 7.4), layout="constrained")
    grid = figure.subplots(2, len(groups), sharey=True, squeeze=False)
    for column, (group, found) in enumerate(groups.items()):
        for row, what in enumerate(("channels", "FLOPs")):
            axes = grid[row, column]
            for name, curve in found["curves"][INNER].items():
                _curve(axes, name, curve, plan.fractions if row == 0 else [f["mean"] for f in curve["flops"]])
            axes.axhline(found["dense"]["mean"], color=INK, lw=0.8, ls=":")
            axes.set_title(f"{group}, by {what}", loc="left", fontsize=10)
            axes.set_xlabel(f"{'inner channels' if row == 0 else 'FLOPs'} removed")
            _percent(axes)
        grid[0, 0].set_ylabel("held-out accuracy, no fine-tuning")
        grid[1, 0].set_ylabel("held-out accuracy, no fine-tuning")
    handles = {h.get_label(): h for axes in grid[0] for h in axes.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8.5)
    figure.suptitle(
        f"Rounds of {plan.step:.0%}; long dashes: not compensated; dotted across: dense; bands: 95 %", fontsize=11
    )
    return figure


def _curve(axes: Axes, name: str, curve: Mapping[str, Any], x: Sequence[float]) -> None:
    criterion = name.split(",")[0]
    width, order = (2.4, 3) if name == "surgeon" else (1.2, 2)
    means = [a["mean"] for a in curve["accuracy"]]
    axes.plot(x, means, label=name, color=OWN[criterion], ls=_line(name), lw=width, marker=".", ms=4, zorder=order)
    if name in BANDED and curve["accuracy"][0]["low"] is not None:
        low, high = ([a[end] for a in curve["accuracy"]] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=OWN[criterion], alpha=0.15, lw=0)


def _line(name: str) -> Any:
    """Solid where the units that stay make up for what goes, dashed where not; the surgeon's variants are dotted."""
    if name == "surgeon" or name.endswith(COMPENSATED):
        return "-"
    return VARIED.get(name, (0, (4, 2)))


def variants(summary: Mapping[str, Any], plan: Plan) -> Figure:
    """Accuracy where most is gone: what one may set about the surgeon, and what else could make up for a set."""
    found = summary["groups"][ALL]
    panels = {f"the surgeon, rounds of {plan.step:.0%}": found["variants"]}
    panels |= {f"rivals, rounds of {float(step):.0%}": curves for step, curves in found["rivals"].items()}
    height = 1.2 + 0.27 * max(map(len, panels.values()))
    figure = Figure(figsize=(5.2 * len(panels), height), layout="constrained")
    for axes, (title, ways) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (fraction, colour) in enumerate(zip(plan.compared, (GREY, COLOURS["taylor_so"], TEAL), strict=False)):
            for row, curve in enumerate(ways.values()):
                mean = curve["accuracy"][i]
                if mean["low"] is not None:
                    axes.plot([mean["low"], mean["high"]], [row, row], color=colour, lw=2, alpha=0.6)
                label = f"{fraction:.0%} of {INNER} gone" if row == 0 else None
                axes.plot(mean["mean"], row, "o", ms=5, color=colour, label=label)
        axes.set_yticks(range(len(ways)), list(ways))
        axes.set_title(title, loc="left", fontsize=10)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.invert_yaxis()
        _tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8.5)
    figure.suptitle("Held-out accuracy, no fine-tuning; all networks, 95 % intervals over seeds", fontsize=11)
    return figure


def prediction(records: Sequence[Mapping[str, Any]]) -> Figure:
    """½ dᵀHd against the measured change of the loss, a dot per set."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, truth in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("scored", "held out"), strict=True):
        for name in [f"{criterion}{end}" for criterion in CHOSEN_BY for end in ("", COMPENSATED)]:
            dots = [found for record in records for found in record["prediction"] if found["set"] == name]
            fill = OWN[name.split(",")[0]]
            made_up = name.endswith(COMPENSATED)
            axes.scatter(
                [dot["second"] for dot in dots], [max(dot[truth], 0) for dot in dots], s=16, label=name, lw=0.9,
                facecolor=fill if made_up else "none", edgecolor=fill, alpha=0.8,
            )  # fmt: skip
        axes.axline((0.1, 0.1), (1, 1), color=INK, lw=0.8, ls=":")
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_xlabel("foretold: ½ dᵀHd")
        axes.set_title(f"{truth} images", loc="left", fontsize=10)
        _tidy(axes)
    figure.axes[0].set_ylabel("measured ΔL (below 0 drawn as 0)")
    figure.axes[1].legend(frameon=False, fontsize=8.5, loc="lower right")
    figure.suptitle("Sets of inner channels gone at once", fontsize=11)
    return figure


def tuning(summary: Mapping[str, Any], plan: Plan) -> Figure:
    """Accuracy against epochs of fine-tuning, for networks of the same FLOPs."""
    groups = summary["groups"]
    figure = Figure(figsize=(3.6 * len(groups), 3.9), layout="constrained")
    for axes, (group, found) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for name, of in found["tuning"].items():
            means = of["accuracy"]
            colour = OWN[name.split(",")[0]]
            axes.plot(plan.epochs, [m["mean"] for m in means], color=colour, ls=_line(name), label=name)
            if name in BANDED and means[0]["low"] is not None:
                ends = [[m[end] for m in means] for end in ("low", "high")]
                axes.fill_between(plan.epochs, *ends, color=colour, alpha=0.12, lw=0)
        last = found["tuning"]["taylor_fo"]["accuracy"][-1]["mean"]
        axes.axhline(last, color=OWN["taylor_fo"], lw=0.8, ls=":")
        axes.set_ylim(max(0.0, last - 0.25), 1.0)
        axes.set_title(group, loc="left", fontsize=10)
        axes.set_xlabel("epochs of fine-tuning")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _tidy(axes)
    figure.axes[0].set_ylabel(f"held-out accuracy, {plan.left:.0%} of the FLOPs")
    figure.axes[0].legend(frameon=False, fontsize=8.5, loc="lower right")
    return figure


def _percent(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _tidy(axes)
