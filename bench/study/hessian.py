"""What the diagonal Gauss-Newton approximation leaves out, against the full Hessian along the gates.

    python -m bench.study.hessian [--seeds 5] [--quick] [--json FILE] [--figure FILE]

Small networks on scikit-learn's digits, with and without batch normalisation and a skip, early and late in training.
Asked of each: how far h (exact, one sketch, one Monte-Carlo draw) is from the Hessian's diagonal, what the rest of the
Hessian weighs, what the approximations do to the ranking of units by the measured change of the loss, and what they
foretell for whole sets of units. Means over seeds, 95 % bootstrap intervals.

Networks with batch normalisation are asked in evaluation mode ("eval") and in training mode, with batch statistics
("train"); "train→eval" holds the scores of training mode against the changes measured in evaluation mode.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import taylorkern as tk
from bench.study import hessian_figure, hessian_tables
from bench.study.hessian_matrices import gauss_newton, gradient_and_hessian, loss_at, with_batch_statistics
from bench.study.small import WIDTHS, SmallNet, accuracy, trained
from taylorkern.correlation import correlations, interval
from taylorkern.coupling import Coupling
from taylorkern.demo.data import Digits, digits

METHODS = ("exact", "sketch", "mc")
SHARES = (0.1, 0.3, 0.5)
GROUPS = (("plain", "eval"), ("BN", "eval"), ("BN", "train"), ("BN", "train→eval"))
RESULTS = Path("bench/results/study-hessian.json")
PICTURE = Path("docs/study-hessian.png")

Minibatches = Sequence[tuple[Tensor, Tensor]]
Figures = dict[str, float]
Values = dict[str, dict[str, list[float]]]  # regime → figure → one per seed


@dataclass(frozen=True)
class Plan:
    """Minibatches of training up to each stage; how many minibatches, of how many images, the derivatives are of.

    ``widths`` are the networks'.
    """

    stages: Mapping[str, int]
    minibatches: int
    size: int
    widths: tuple[int, int] = WIDTHS


FULL = Plan({"short": 100, "long": 600}, minibatches=2, size=96)
QUICK = Plan({"short": 10, "long": 40}, minibatches=1, size=32, widths=(6, 8))


@dataclass(frozen=True)
class Measured:
    """One network's second-order terms at z = 1, and the truth; B minibatches, U units, all in float64."""

    model: nn.Module
    coupling: Coupling
    batches: Minibatches
    change: Tensor  # ΔL [B, U], measured by the oracle
    gradient: Tensor  # G [B, U]
    hessian: Tensor  # [B, U, U]
    ggn: Tensor  # [B, U, U]
    h: dict[str, Tensor]  # [B, U] by method, "fisher" among them: the free empirical Fisher

    def foretold(self) -> dict[str, Tensor]:
        """ΔL [B, U] as each approximation has it."""
        diagonals = {"hessian": self.hessian.diagonal(dim1=1, dim2=2), **self.h}
        return {"first": -self.gradient, **{name: h / 2 - self.gradient for name, h in diagonals.items()}}


def measure(model: nn.Module, batches: Minibatches, seed: int) -> Measured:
    """Everything asked of ``model``, in the mode it is in."""
    scored = tk.convert(copy.deepcopy(model))
    scores = tk.Scores(scored, batches[0][0][:1])
    generator = torch.Generator().manual_seed(seed)
    h = [_curvatures(scores, x, targets, generator) for x, targets in batches]
    derivatives = [gradient_and_hessian(model, scores.coupling, x, targets) for x, targets in batches]
    return Measured(
        model,
        scores.coupling,
        batches,
        change=tk.oracle(model, batches[0][0], F.cross_entropy, batches),
        gradient=torch.stack([gradient for gradient, _ in derivatives]),
        hessian=torch.stack([hessian for _, hessian in derivatives]),
        ggn=torch.stack([gauss_newton(model, scores.coupling, x) for x, _ in batches]),
        h={name: torch.stack([minibatch[name] for minibatch in h]) for name in h[0]},
    )


def _curvatures(scores: tk.Scores, x: Tensor, targets: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """h [U] of one minibatch by each method, and the empirical Fisher, as the package gives them."""
    found = {}
    for method in METHODS:
        scores.reset()
        logits = scores.model(x)
        scores.curvature(logits, targets, method=method, generator=generator)
        F.cross_entropy(logits, targets).backward()
        found[method] = 2 * scores.importance("obd")
    return {**found, "fisher": scores.importance("taylor_fg")}


def errors(m: Measured) -> Figures:
    """Distances between the approximations, relative, as means over minibatches."""
    diagonal, ggn = m.hessian.diagonal(dim1=1, dim2=2), m.ggn.diagonal(dim1=1, dim2=2)
    return {
        "units": float(len(m.coupling.units)),
        **{f"error of h, {name}": _distance(h, diagonal) for name, h in m.h.items()},
        "error of h, GGN": _distance(ggn, diagonal),
        "off the diagonal": _distance(torch.diag_embed(diagonal), m.hessian),
        "GGN against H": _distance(m.ggn, m.hessian),
        "negative H_uu": float((diagonal < 0).sum(1).double().mean()),
        "h against GGN's diagonal": _distance(m.h["exact"], ggn),
        "h over GGN's diagonal": float((m.h["exact"].sum(1) / ggn.sum(1)).mean()),
    }


def _distance(approximate: Tensor, true: Tensor) -> float:
    """‖approximate - true‖ / ‖true‖ of [B, ...], mean over B."""
    return float(((approximate - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).mean())


def ranking(m: Measured) -> Figures:
    """Agreement with the measured truth over the units: of squares, E_b[ΔL²], and of ΔL itself, E_b[ΔL]."""
    found = {}
    for name, foretold in m.foretold().items():
        squares = correlations(m.change.square().mean(0), foretold.square().mean(0))
        signed = correlations(m.change.mean(0), foretold.mean(0))
        for coefficient in ("pearson", "spearman"):
            found[f"{coefficient} of squares, {name}"] = squares[coefficient]
            found[f"{coefficient} of changes, {name}"] = signed[coefficient]
    return found


def sets(m: Measured) -> Figures:
    """The lowest units by taylor_so, gone together: measured ΔL, and what each approximation foretells, in nats."""
    order = m.foretold()["sketch"].square().mean(0).argsort()
    found = {}
    for share in SHARES:
        removed = order[: _count(share, m)]
        found[f"{share:.0%} measured"] = change_without(m, removed)
        for name, foretold in m.foretold().items():
            found[f"{share:.0%} diagonal, {name}"] = float(foretold[:, removed].sum(1).mean())
        for name, matrix in (("GGN", m.ggn), ("hessian", m.hessian)):
            block = matrix[:, removed][:, :, removed]
            found[f"{share:.0%} full, {name}"] = float((block.sum((1, 2)) / 2 - m.gradient[:, removed].sum(1)).mean())
    return found


def choices(m: Measured) -> Figures:
    """Measured ΔL of sets chosen with single units' terms, and with the whole matrices, in nats."""
    orders = {name: foretold.square().mean(0).argsort() for name, foretold in m.foretold().items()}
    orders |= {f"greedy {name}": greedy(m.gradient, matrix) for name, matrix in (("GGN", m.ggn), ("H", m.hessian))}
    return {
        f"{share:.0%} gone by {name}": change_without(m, order[: _count(share, m)])
        for share in SHARES
        for name, order in orders.items()
    }


def greedy(gradient: Tensor, matrix: Tensor) -> Tensor:
    """Units in the order in which they go if each is the one of least E_b[δ²] beside those that are gone.

    δ [B, U] is what the second order foretells for a unit then: ½H_uu - G_u + Σ_v H_uv over those gone. Without
    the sum this is the order of ``taylor_so``. ``gradient`` is [B, U], ``matrix`` [B, U, U].
    """
    change = matrix.diagonal(dim1=1, dim2=2) / 2 - gradient
    order: list[int] = []
    left = torch.ones(gradient.shape[1], dtype=torch.bool)
    for _ in range(len(left)):
        order.append(int(change.square().mean(0).where(left, torch.inf).argmin()))
        left[order[-1]] = False
        change = change + matrix[:, :, order[-1]]
    return torch.tensor(order)


@torch.no_grad()
def change_without(m: Measured, removed: Tensor) -> float:
    """E_b[ΔL] with all of ``removed`` gone."""
    ones = torch.ones(len(m.coupling.units), dtype=torch.float64)
    gone = ones.index_fill(0, removed, 0)
    changes = [
        loss_at(m.model, m.coupling, x, targets, gone) - loss_at(m.model, m.coupling, x, targets, ones)
        for x, targets in m.batches
    ]
    return float(torch.stack(changes).mean())


def _count(share: float, m: Measured) -> int:
    return round(share * len(m.coupling.units))


Questions = tuple[Callable[[Measured], Figures], ...]
OF_APPROXIMATIONS: Questions = (errors,)
OF_THE_TRUTH: Questions = (ranking, sets, choices)


def regimes(model: nn.Module, batches: Minibatches, seed: int) -> Iterator[tuple[str, Measured, Questions]]:
    """What is asked of a network in evaluation mode, by the modes that scores and truth are from."""
    evaluated = measure(model, batches, seed)
    yield "eval", evaluated, OF_APPROXIMATIONS + OF_THE_TRUTH
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        trained_on = measure(with_batch_statistics(model), batches, seed)
        yield "train", trained_on, OF_APPROXIMATIONS + OF_THE_TRUTH
        yield "train→eval", replace(trained_on, model=model, change=evaluated.change), OF_THE_TRUTH


def networks(data: Digits, plan: Plan, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Every trained network of one seed."""
    for batch_norm in (False, True):
        for skip in (False, True):
            torch.manual_seed(seed)
            for stage, model in trained(data, SmallNet(batch_norm, skip, plan.widths), plan.stages, seed):
                yield f"{'BN' if batch_norm else 'plain'}{', skip' if skip else ''}, {stage}", model


def minibatches_of(data: Digits, plan: Plan, seed: int) -> Minibatches:
    """Training images as they are, drawn without replacement."""
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[: plan.minibatches * plan.size].split(plan.size)
    return [(data.train_images[c].double(), data.train_labels[c]) for c in chosen]


def study(plan: Plan, seeds: int) -> tuple[Values, dict[str, Measured]]:
    """Every figure of every regime, a value per seed, and the first seed's measurements for the picture."""
    data = digits()
    values: Values = {}
    first: dict[str, Measured] = {}
    for seed in range(seeds):
        batches = minibatches_of(data, plan, seed)
        for network, model in tqdm(networks(data, plan, seed), desc=f"seed {seed}", unit="network", total=8):
            reached = accuracy(model, data.test_images, data.test_labels)
            for mode, measured, questions in regimes(model, batches, seed):
                name = f"{network}, {mode}"
                first.setdefault(name, measured)
                figures = {"accuracy": reached}
                for question in questions:
                    figures |= question(measured)
                for figure, value in figures.items():
                    values.setdefault(name, {}).setdefault(figure, []).append(value)
    return values | _together(values), first


def _together(values: Values) -> Values:
    """Means over networks, seed by seed: of all in evaluation mode, of those with normalisation in each mode."""
    groups = {f"all {kind}, {mode}": (kind, f", {mode}") for kind, mode in GROUPS}
    together = {}
    for group, (kind, mode) in groups.items():
        members = [v for name, v in values.items() if name.startswith(kind) and name.endswith(mode)]
        together[group] = {
            figure: [sum(of) / len(of) for of in zip(*(v[figure] for v in members), strict=True)]
            for figure in members[0]
        }
    return together


def summary(values: Values, plan: Plan) -> dict[str, Any]:
    """JSON-able: what was run, every figure's mean over seeds and interval, and its value for each seed."""
    found = {
        name: {figure: _summed_up(per_seed) for figure, per_seed in figures.items()} for name, figures in values.items()
    }
    versions = {"taylorkern": tk.__version__, "torch": torch.__version__}
    return {"plan": asdict(plan), "versions": versions, "regimes": found}


def _summed_up(per_seed: Sequence[float]) -> dict[str, Any]:
    low, high = interval(per_seed)
    mean = sum(per_seed) / len(per_seed)
    return {"mean": _plain(mean), "low": _plain(low), "high": _plain(high), "seeds": [_plain(v) for v in per_seed]}


def _plain(value: float) -> float | None:
    """Four digits; JSON has no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, help="networks per regime; 5, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="seconds: little training, one small minibatch")
    parser.add_argument("--json", type=Path, help=f"where the figures go; {RESULTS} unless --quick")
    parser.add_argument("--figure", type=Path, help=f"where the picture goes; {PICTURE} unless --quick")
    options = parser.parse_args(arguments)
    plan, seeds, to_json, to_figure = (QUICK, 2, None, None) if options.quick else (FULL, 5, RESULTS, PICTURE)
    values, first = study(plan, options.seeds or seeds)
    found = summary(values, plan)
    print(hessian_tables.tables(found))
    if path := options.json or to_json:
        path.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n")
    if path := options.figure or to_figure:
        hessian_figure.draw(found, first).savefig(path, dpi=120, facecolor="white")
    return 0


if __name__ == "__main__":
    sys.exit(main())
