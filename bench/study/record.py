"""Everything the study measures on one trained network, as plain numbers."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylorkern as tk
from taylorkern.correlation import by_layer, correlations
from taylorkern.demo.data import Digits

from .networks import LAYER
from .plan import Plan
from .removal import accuracy, at_once, pools, round_by_round
from .schedules import schedules
from .scoring import Batches, accumulate, importances, scorer
from .training import fixed_batches


def record(network: str, stage: str, seed: int, model: nn.Module, plan: Plan, data: Digits) -> dict[str, Any]:
    """Correlations and one-shot curves at every stage; iterative curves, schedules and ranks at the last one."""
    batches = fixed_batches(data, plan.minibatches, plan.size, seed)
    dense = copy.deepcopy(model)
    scores = scorer(model, batches, seed)
    truth = tk.oracle(model, batches[0][0][:1], F.cross_entropy, batches).square().mean(0)
    ranked = importances(scores, batches, seed)
    removable = pools(scores, LAYER[network])
    curves = {pool: at_once(scores, {"oracle": truth, **ranked}, units, plan.fractions, data)
              for pool, units in removable.items()}  # fmt: skip
    found = {
        "network": network,
        "stage": stage,
        "seed": seed,
        "units": {pool: len(units) for pool, units in removable.items()},
        "loss": _loss(model, batches),
        "accuracy": accuracy(model, data),
        "correlation": {name: _finite(correlations(truth, importance)) for name, importance in ranked.items()},
        "by layer": _by_layer(scores, truth, ranked),
        "one-shot": curves,
    }
    if stage == list(plan.steps)[-1]:
        few = batches[: plan.iterative_minibatches]
        found["iterative"] = {
            pool: round_by_round(scores, few, units, plan, data, seed)
            for pool, units in removable.items()
            if pool != "one layer"
        }
        found["schedules"] = schedules(dense, few, plan, data, seed)
        found["ranks"] = _ranks(dense, batches, plan, seed)
    return found


def _loss(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(images), labels)) for images, labels in batches) / len(batches)


def _by_layer(scores: tk.Scores, truth: Tensor, ranked: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Spearman's coefficient among each layer's own units."""
    layers = by_layer(scores.coupling)
    return {
        layer: {name: _finite(correlations(truth[u], ranked[name][u]))["spearman"] for name in ranked}
        for layer, u in layers.items()
    }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _ranks(dense: nn.Module, batches: Batches, plan: Plan, seed: int) -> dict[str, dict[str, list[float]]]:
    """Relative ranks (0 least important, 1 most) of each layer's units by taylor_so, before and after a half went."""
    thin = tk.convert(copy.deepcopy(dense))
    scores = tk.Scores(thin, batches[0][0][:1])
    accumulate(scores, batches, "sketch", seed)
    before, rounds = _relative_ranks(scores), plan.cut_rounds
    units = len(scores.units)
    for done in range(1, rounds + 1):
        left = math.ceil(units * (1 - 0.5 * done / rounds)) / len(scores.units)
        tk.prune(thin, batches[0][0][:1], scores.importance("taylor_so"), target=left, of="channels")
        accumulate(scores, batches, "sketch", seed)
    return {"before": before, "after": _relative_ranks(scores)}


def _relative_ranks(scores: tk.Scores) -> dict[str, list[float]]:
    ranks = scores.importance("taylor_so").argsort().argsort().double() / max(1, len(scores.units) - 1)
    return {layer: ranks[units].tolist() for layer, units in by_layer(scores.coupling).items()}
