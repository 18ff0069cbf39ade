"""Whole training steps as a picture: one panel per network, one bar per way and layout, whiskers at the quartiles.

Bars start at the plain step: to the left is faster, to the right slower. What is off the picture says its value.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from bench.bars import found
from bench.tables import Result, named

SHOWN_AT = "docs/bench-steps.png"
INK, FAINT = "#2b2d33", "#e6e9ed"
OURS, OTHERS = ("#1f6f8b", "#7fb3c4"), ("#8d949e", "#c9ced6")  # channels_last, contiguous
LAYOUTS = ("channels_last", "contiguous")
MINE = ("converted", "scored", "fused", "fused, scored")
HEIGHT = 0.36
RANGE = (0.7, 1.8)
SOURCE = "Source"  # the PNG's text that says which result it shows


def draw(result: Result, path: Path) -> None:
    """Write the picture of ``result`` to ``path``."""
    rows = list(found(result["rows"], "steps"))
    networks = list(dict.fromkeys(row["subject"]["network"] for row in rows))
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != "plain"]
    figure = Figure(figsize=(4.2 * len(networks) + 1.2, 0.42 * len(ways) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        _panel(axes, [row for row in rows if row["subject"]["network"] == network], ways)
        of = next(row["subject"] for row in rows if row["subject"]["network"] == network)
        axes.set_title(f"{named(of)}, {of['size']}x{of['size']}, batch {of['batch']}", color=INK)
    panels[0].set_yticks(range(len(ways)), ways)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white", metadata={SOURCE: _checksum(result)})


def _panel(axes: Axes, rows: list[dict[str, Any]], ways: list[str]) -> None:
    for number, layout in enumerate(LAYOUTS):
        for mine in (True, False):
            shown = [row for row in rows if row["way"] in ways and (row["way"] in MINE) == mine]
            shown = [row for row in shown if row["subject"]["layout"] == layout]
            at = np.array([ways.index(row["way"]) for row in shown]) + (number - 0.5) * HEIGHT
            low, middle, high = (np.array([row["ratio"][q] for row in shown]) for q in ("p25", "median", "p75"))
            label = f"{'taylorkern' if mine else 'others'}, {layout}"
            axes.barh(at, middle - 1, HEIGHT, left=1, color=(OURS if mine else OTHERS)[number], label=label)
            whiskers = (middle - low, high - middle)
            axes.errorbar(middle, at, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            for y, value in zip(at, middle, strict=True):
                if value > RANGE[1]:
                    axes.text(RANGE[1], y, f"{value:.1f} ", ha="right", va="center", fontsize=7, color="white")
    axes.axvline(1.0, color=INK, lw=1)
    axes.set_xlim(*RANGE)
    axes.set_xlabel("time of a step, plain = 1", color=INK)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shows(path: Path, result: Result) -> bool:
    """Whether the picture at ``path`` was drawn from ``result``."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(SOURCE) == _checksum(result)


def _checksum(result: Result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
