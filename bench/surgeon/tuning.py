"""Networks cut to the same FLOPs by each criterion, in rounds, and then trained: accuracy after some epochs of it."""

import copy
from typing import Any

from torch import nn

import taylorkern as tk
from bench.study.removal import accuracy
from bench.study.scoring import accumulate
from bench.study.training import fixed_batches, train
from taylorkern.budget import Meter
from taylorkern.demo.data import Digits

from .plan import Plan
from .ways import COMPENSATED, Way

TUNED: dict[str, Way] = {
    "taylor_fo": Way("taylor_fo", repair=None),
    "taylor_so": Way("taylor_so", repair=None),
    "taylor_so" + COMPENSATED: Way("taylor_so"),
    "surgeon": Way(),
    "surgeon, per whole cost": Way(cost_power=1.0),
    "surgeon, whatever the cost": Way(cost_power=0.0),
}


def tuned(model: nn.Module, plan: Plan, data: Digits, seed: int) -> dict[str, dict[str, Any]]:
    """Held-out accuracy after each of ``plan.epochs`` of training behind the cuts, and what is left."""
    return {name: _tuned(copy.deepcopy(model), way, plan, data, seed) for name, way in TUNED.items()}


def _tuned(thin: nn.Module, way: Way, plan: Plan, data: Digits, seed: int) -> dict[str, Any]:
    left, units = cut_in_rounds(thin, way, plan, data, seed)
    reached, done = [], 0
    for epoch in plan.epochs:
        train(thin, data, (epoch - done) * plan.epoch, plan.tuning_rate, seed=1000 * seed + done)
        reached.append(accuracy(thin.eval(), data))
        done = epoch
    return {"accuracy": reached, "flops": left, "units": units}


def cut_in_rounds(thin: nn.Module, way: Way, plan: Plan, data: Digits, seed: int) -> tuple[float, int]:
    """Cut ``thin`` to ``plan.left`` of its FLOPs, by new scores each round; returns the part left, and its units."""
    batches = fixed_batches(data, plan.minibatches, plan.size, seed)
    example = batches[0][0][:1]
    scores = tk.Scores(tk.convert(thin.eval()), example, gram="full", seed=seed)
    dense = Meter(thin, scores.coupling, "flops").total
    rounds = round((1 - plan.left) / plan.cut_step)
    for done in range(1, rounds + 1):
        accumulate(scores, batches, way.method, seed + done)
        goal = dense * (1 - (1 - plan.left) * done / rounds)
        now = Meter(thin, scores.coupling, "flops").total
        if goal < now:
            tk.prune(
                thin, example, criterion=way.criterion, target=goal / now, of="flops", compensate=way.shifts,
                damping=way.damping, bound=way.bound, cost_power=way.cost_power,
            )  # fmt: skip
    scores.detach()
    return Meter(thin, scores.coupling, "flops").total / dense, len(scores.units)
