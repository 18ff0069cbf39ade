"""The tables of the Hessian study, in Markdown: a row per regime, a mean over seeds and its interval per entry."""

from collections.abc import Mapping, Sequence
from typing import Any

ERRORS = {
    "units": "units",
    "accuracy": "accuracy",
    "exact": "error of h, exact",
    "sketch": "error of h, sketch",
    "mc": "error of h, mc",
    "fisher": "error of h, fisher",
    "true GGN diagonal": "error of h, GGN",
    "negative H_uu": "negative H_uu",
}
MATRICES = {
    "‖H - diag H‖/‖H‖": "off the diagonal",
    "‖GGN - H‖/‖H‖": "GGN against H",
    "‖h - diag GGN‖/‖diag GGN‖": "h against GGN's diagonal",
    "Σh/Σ diag GGN": "h over GGN's diagonal",
}
TERMS = {
    "G": "first",
    "½H_uu - G": "hessian",
    "½h - G, exact": "exact",
    "sketch": "sketch",
    "mc": "mc",
    "fisher": "fisher",
}
SHARES = ("10%", "30%", "50%")
FORETOLD = {
    "measured": "measured",
    "-ΣG": "diagonal, first",
    "½Σh - ΣG, sketch": "diagonal, sketch",
    "½Σh - ΣG, exact": "diagonal, exact",
    "½ΣH_uu - ΣG": "diagonal, hessian",
    "½ 1ᵀGGN 1 - ΣG": "full, GGN",
    "½ 1ᵀH 1 - ΣG": "full, hessian",
}
CHOSEN = {
    "taylor_fo": "gone by first",
    "taylor_so, sketch": "gone by sketch",
    "exact": "gone by exact",
    "diag H": "gone by hessian",
    "greedy, GGN": "gone by greedy GGN",
    "greedy, H": "gone by greedy H",
}
KINDS = {
    "squares": "measured (ΔL)² against its prediction's square, E_b of each",
    "changes": "measured ΔL, signed, against its prediction",
}
SETS = {
    "The lowest {} by taylor_so (sketch) gone together: ΔL in nats, measured and foretold": FORETOLD,
    "{} of the units gone: measured ΔL in nats, by what chose them": CHOSEN,
}
ROUNDING = 1e-12


def tables(found: Mapping[str, Any]) -> str:
    """All tables of a study's summary; those of sets only for groups of networks, the JSON has each network."""
    each = found["regimes"]
    groups = {name: figures for name, figures in each.items() if name.startswith("all ")}
    parts = [
        table("How far h is from the Hessian's diagonal, ‖h - diag H‖/‖diag H‖", ERRORS, each),
        table("What the rest of the matrix weighs, and Gauss-Newton against the Hessian", MATRICES, each),
    ]
    for kind, rows in (("squares", each), ("changes", groups)):
        for coefficient in ("pearson", "spearman"):
            columns = {column: f"{coefficient} of {kind}, {term}" for column, term in TERMS.items()}
            parts.append(table(f"{coefficient.capitalize()}: {KINDS[kind]}", columns, rows))
    for title, columns in SETS.items():
        for share in SHARES:
            of_share = {column: f"{share} {figure}" for column, figure in columns.items()}
            parts.append(table(title.format(share), of_share, groups))
    return "\n\n".join(parts)


def table(title: str, columns: Mapping[str, str], regimes: Mapping[str, Any]) -> str:
    """``columns`` from heading to figure; a regime of which they were not asked has no row."""
    asked = {
        name: figures for name, figures in regimes.items() if all(figure in figures for figure in columns.values())
    }
    rows = [[name, *(entry(figures[figure]) for figure in columns.values())] for name, figures in asked.items()]
    return "\n".join([f"{title}\n", _line(["", *columns]), _line(["---"] * (len(columns) + 1)), *map(_line, rows)])


def entry(figure: Mapping[str, Any]) -> str:
    """A mean and its interval, where there is one."""
    mean, low, high = figure["mean"], figure["low"], figure["high"]
    if mean is None:
        return "undefined"
    if abs(mean) < ROUNDING:
        return "0"
    return f"{mean:.3g}" if low is None or low == high else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"
