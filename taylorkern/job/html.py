"""The report of `taylorkern prune`: one HTML file that needs no network, no script and no other file."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from html import escape
from importlib.resources import files as resources
from string import Template

from taylorkern import files

from . import figures
from .figures import Summary, number
from .ranks import ranking

NAMED = 1000  # skipped images that are named
NOTHING = "–"


def write(summary: Summary, path: str | os.PathLike[str]) -> None:
    """Write the report of a run's ``summary`` to ``path``, whole or not at all.

    Figures that are missing, None or NaN are written as a dash, and pictures without any are left out.
    Raises OSError where the file can't be written.
    """
    files.replace(path, page(summary).encode("utf-8", "backslashreplace"))


def page(summary: Summary) -> str:
    """The report as text; whatever a user named (classes, files, options) is escaped.

    >>> figures = {"accuracy": 0.9, "flops": 2e6}
    >>> told = page({"dense": figures, "pruned": figures, "ratios": {"flops": 1.0}, "settings": {"model": "<b>"}})
    >>> "&lt;b&gt;" in told, "<b>" in told
    (True, False)
    """
    template = Template(resources(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    summary = {"dense": {}, "pruned": {}, "ratios": {}, **summary}
    model = _plain(summary.get("settings", {}).get("model") or "A network")
    sections = (part(summary) for part in (_table, _way, _training, _widths, _ranks, _data, _settings, _command))
    return template.substitute(
        title=escape(f"taylorkern prune: {model}"),
        above=f"taylorkern prune · {escape(model)}",
        headline=escape(_headline(summary)),
        below=escape(_asked(summary)),
        tiles="".join(_tiles(summary)),
        sections="\n".join(filter(None, sections)),
    )


def _headline(summary: Summary) -> str:
    dense, pruned = (_share(summary[name].get("accuracy")) for name in ("dense", "pruned"))
    return f"{_share(summary['ratios'].get('flops'), 0)} of the FLOPs, accuracy {dense} → {pruned}"


def _asked(summary: Summary) -> str:
    target = _share(summary.get("target"), 0)
    of = {"flops": "FLOPs", "params": "parameters"}.get(summary.get("of", ""), _plain(summary.get("of")))
    return f"Chosen by {_plain(summary.get('criterion'))}, down to {target} of the dense network's {of}"


def _tiles(summary: Summary) -> Iterable[str]:
    """What changed, in four figures: the pruned network's, above it the name, below what it was and the ratio."""
    tiles = (
        ("FLOPs per image", "flops", _short, _times),
        ("Accuracy", "accuracy", _share, _points),
        ("Latency", "latency_ms", _milliseconds, _times),
        ("Parameters", "params", _short, _times),
    )
    for name, key, told, compared in tiles:
        dense, pruned = (summary[which].get(key) for which in ("dense", "pruned"))
        below = f"from {told(dense)}, {compared(number(dense), number(pruned))}"
        yield f"<li><span>{name}</span><strong>{told(pruned)}</strong><span>{below}</span></li>"


def _table(summary: Summary) -> str:
    rows = (
        ("Validation accuracy", "accuracy", _share, _points),
        ("Validation loss", "loss", _four, _times),
        ("Parameters", "params", _count, _times),
        ("FLOPs per image", "flops", _count, _times),
        (f"Latency of {_count(summary.get('latency_batch'))} images", "latency_ms", _milliseconds, _times),
    )
    lines = []
    for name, key, told, compared in rows:
        dense, pruned = (summary[which].get(key) for which in ("dense", "pruned"))
        cells = (told(dense), told(pruned), compared(number(dense), number(pruned)))
        lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th></th><th>dense</th><th>pruned</th><th>pruned to dense</th></tr>"
    timed = (
        "Latency is that of a batch at once in evaluation mode, in 32-bit floating point and contiguous memory, not "
        "compiled, whatever the training ran in."
    )
    return _section(
        "Before and after", timed, f'<div class="wide"><table class="figures">{head}{"".join(lines)}</table></div>'
    )


def _way(summary: Summary) -> str:
    tuned = any(point.get("phase") == "finetune" for point in summary.get("history", ()))
    end = "after fine-tuning" if tuned else "in the end, without fine-tuning"
    told = f"Each dot is a round of pruning, the ring the network {end}, the dashed line the dense network."
    return _section("Accuracy on the way down", told, figures.descent(summary))


def _training(summary: Summary) -> str:
    names = dict.fromkeys(str(point.get("phase")) for point in summary.get("history", ()))
    told = f"Phases from left to right: {', '.join(names)}."
    return _section("Training", told, figures.curves(summary))


def _widths(summary: Summary) -> str:
    told = _key("dense", "before") + _key("main", "after")
    return _section("Widths", "", f"<p>{told}</p>{picture}" if (picture := figures.widths(summary)) else "")


def _key(colour: str, told: str) -> str:
    return f'<span class="key" style="background:var(--{colour})"></span>{told} '


def _ranks(summary: Summary) -> str:
    told = (
        f"Where each layer's units stand among all, by {ranking(_plain(summary.get('criterion')))}, before the first "
        "cut: from the least important to the most, the middle half as a box, the median as a bar."
    )
    if "history" in summary and not summary.get("ranks"):
        return _section("Ranks by layer", "", "<p>There are none: the target was met without a round of pruning.</p>")
    return _section("Ranks by layer", told, figures.ranks(summary))


def _data(summary: Summary) -> str:
    images, classes = summary.get("images", {}), summary.get("classes", ())
    skipped = images.get("skipped", ())
    pairs = {
        "training images": _count(images.get("train")),
        "validation images": _count(images.get("val")),
        f"{len(classes)} classes": ", ".join(map(_plain, classes)),
        "skipped images": _count(len(skipped)),
        "minibatches dropped, for gradients that were not finite": _count(summary.get("dropped")),
        "minibatches of which too few images could be read": _count(summary.get("empty")),
    }
    named = {_plain(image.get("file")): _plain(image.get("why")) for image in skipped[:NAMED]}
    more = f"<p>and {_count(len(skipped) - NAMED)} more</p>" if len(skipped) > NAMED else ""
    left_out = f"<h3>Skipped images</h3>{_pairs(named)}{more}" if named else ""
    warnings = "".join(f"<p>{escape(_plain(warning))}</p>" for warning in summary.get("warnings", ()))
    return _section("Data", "", warnings + _pairs(pairs) + left_out)


def _settings(summary: Summary) -> str:
    options = {key: _plain(value) for key, value in summary.get("settings", {}).items()}
    machine = {**summary.get("versions", {}), "device": summary.get("device"), "threads": summary.get("threads")}
    ran_with = _pairs({key: _plain(value) for key, value in machine.items()})
    return _section("Settings", "", f"{_pairs(options)}<h3>Run with</h3>{ran_with}")


def _command(summary: Summary) -> str:
    return _section("To repeat it", "", f"<pre>{escape(_plain(summary.get('command')))}</pre>")


def _section(name: str, told: str, inside: str) -> str:
    """ "" where there is nothing inside."""
    below = f"<p>{escape(told)}</p>" if told else ""
    return f"<section><h2>{name}</h2>{below}{inside}</section>" if inside else ""


def _pairs(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs.items())
    return f'<div class="list"><table class="pairs">{rows}</table></div>' if rows else ""


def _plain(value: object) -> str:
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _finite(told: Callable[[float], str]) -> Callable[..., str]:
    """``told`` for numbers, a dash for everything else."""

    def safely(value: object, *more: int) -> str:
        return told(number(value), *more) if math.isfinite(number(value)) else NOTHING

    return safely


@_finite
def _share(value: float, decimals: int = 2) -> str:
    return f"{value:.{decimals}%}".replace("%", " %")


@_finite
def _count(value: float) -> str:
    return f"{value:,.0f}"


@_finite
def _four(value: float) -> str:
    return f"{value:.4f}"


@_finite
def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


@_finite
def _short(value: float) -> str:
    """Three digits and a unit: 1.82 G."""
    unit = next((unit for unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= unit[0]), (1.0, ""))
    return f"{value / unit[0]:.3g}{unit[1]}"


def _times(dense: float, pruned: float) -> str:
    return f"× {pruned / dense:.2f}" if dense and math.isfinite(pruned / dense) else NOTHING


def _points(dense: float, pruned: float) -> str:
    return f"{100 * (pruned - dense):+.2f} points".replace("-", "−") if math.isfinite(pruned - dense) else NOTHING
