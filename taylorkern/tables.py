"""What a comparison found, as text: criteria against the measured change of the loss, over all units and by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from .correlation import COEFFICIENTS


def tell(result: Mapping[str, Any]) -> str:
    """The tables of a result of ``compare``, best Spearman first, and what they rest on."""
    names = _ranked(result["summary"]["all"])
    return "\n\n".join(
        (_heading(result), _over_all(result["summary"]["all"], names), _by_layer(result, names), _hurting(result))
    )


def _ranked(rows: Mapping[str, Any]) -> list[str]:
    def spearman(name: str) -> float:
        mean = rows[name]["spearman"]["mean"]
        return -2.0 if mean is None else mean

    return sorted(rows, key=spearman, reverse=True)


def _heading(result: Mapping[str, Any]) -> str:
    networks, facts = result["networks"], result["facts"]
    first = networks[0]
    several = len(networks) > 1
    spread = "[95 % bootstrap interval of the mean over networks]" if several else "one network: there is no interval"
    return (
        f"{first['model']}, seeds {', '.join(str(n['seed']) for n in networks)}: {len(first['units'])} of "
        f"{first['units_found']} units, {first['minibatches']} minibatches, {facts['loss']}, {facts['mode']} mode\n"
        f"Importance against the measured (ΔL)², mean over networks; {spread}"
    )


def _over_all(rows: Mapping[str, Any], names: Sequence[str]) -> str:
    cells = [[name, *(_cell(rows[name][kind]) for kind in COEFFICIENTS)] for name in names]
    return _aligned([["criterion", *(kind.capitalize() for kind in COEFFICIENTS)], *cells], left=4)


def _by_layer(result: Mapping[str, Any], names: Sequence[str]) -> str:
    first, layers = result["networks"][0], result["summary"]["layers"]
    cells = [
        [layer, str(len(first["layers"].get(layer, ()))), *(_number(rows[name]["spearman"]["mean"]) for name in names)]
        for layer, rows in layers.items()
    ]
    return "Spearman by layer\n" + _aligned([["layer", "units", *names], *cells], left=1)


def _hurting(result: Mapping[str, Any]) -> str:
    counts = ", ".join(str(len(network["removal_lowers_loss"])) for network in result["networks"])
    told = f"Units whose removal lowers the loss: {counts}"
    unmeasured = sum(network["not_finite"] for network in result["networks"])
    return f"{told}. Left out, for a loss that is not finite: {unmeasured}" if unmeasured else told


def _cell(value: Mapping[str, Any]) -> str:
    if value["low"] is None:
        return _number(value["mean"])
    return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns as wide as their widest cell; the first ``left`` start at the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
