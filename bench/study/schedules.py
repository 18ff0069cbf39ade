"""One-shot against iterative against continuous pruning, each with the same number of training minibatches."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern.demo.data import Digits, minibatches

from .plan import Plan
from .removal import accuracy
from .scoring import VARIANTS, Batches, accumulate
from .training import BATCH, train

COMPARED = ("taylor_fo", "taylor_so", "taylor_so_fisher", "magnitude", "random")


def schedules(model: nn.Module, batches: Batches, plan: Plan, data: Digits, seed: int) -> dict[str, dict[str, dict]]:
    """Held-out accuracy with ``plan.left`` of the channels, for every schedule and criterion of ``COMPARED``.

    "one-shot" scores once, cuts once and trains for ``plan.budget`` minibatches; "iterative" scores and cuts in rounds
    and trains afterwards; "continuous" scores in the training minibatches themselves, in training mode, and cuts while
    it trains. The other two score in evaluation mode. Gives the accuracy "cut", before any training behind the last
    cut, and "trained".
    """
    return {
        name: {criterion: run(model, criterion, batches, plan, data, seed) for criterion in COMPARED}
        for name, run in SCHEDULES.items()
    }


def _one_shot(
    model: nn.Module, criterion: str, batches: Batches, plan: Plan, data: Digits, seed: int
) -> dict[str, float]:
    return _in_rounds(model, criterion, batches, plan, data, seed, rounds=1)


def _iterative(
    model: nn.Module, criterion: str, batches: Batches, plan: Plan, data: Digits, seed: int
) -> dict[str, float]:
    return _in_rounds(model, criterion, batches, plan, data, seed, rounds=plan.cut_rounds)


def _in_rounds(
    model: nn.Module, criterion: str, batches: Batches, plan: Plan, data: Digits, seed: int, rounds: int
) -> dict[str, float]:
    thin, example = tk.convert(copy.deepcopy(model)), batches[0][0][:1]
    scores = tk.Scores(thin, example, criteria=[criterion], seed=seed)
    units = len(scores.units)
    for done in range(1, rounds + 1):
        accumulate(scores, batches, VARIANTS[criterion].method, seed + done)
        left = math.floor(units * (1 - (1 - plan.left) * done / rounds))
        tk.prune(thin, example, scores.importance(criterion), target=left / len(scores.units), of="channels")
    scores.detach()
    before = accuracy(thin.eval(), data)
    train(thin, data, plan.budget, plan.tuning_rate, seed)
    return {"cut": before, "trained": accuracy(thin.eval(), data)}


def _continuous(
    model: nn.Module, criterion: str, batches: Batches, plan: Plan, data: Digits, seed: int
) -> dict[str, float]:
    thin = tk.convert(copy.deepcopy(model)).train()
    optimizer = torch.optim.SGD(thin.parameters(), plan.tuning_rate, momentum=0.9, weight_decay=5e-4)
    example, method = batches[0][0][:1], VARIANTS[criterion].method
    rounds = min(plan.cut_rounds, plan.budget // 2)
    every = plan.budget // 2 // rounds
    step = math.ceil(len(tk.couple(thin, example).units) * (1 - plan.left) / rounds)
    pruner = tk.Pruner(
        thin, example, optimizer=optimizer, criterion=criterion, target=plan.left, of="channels",
        every=every, step=step, seed=seed,
    )  # fmt: skip
    before, stream = math.nan, minibatches(data, BATCH, torch.Generator().manual_seed(seed))
    signs = torch.Generator().manual_seed(seed)
    for _ in range(plan.budget):
        images, labels = next(stream)
        logits = thin(images)
        if method is not None and not pruner.done:
            pruner.scores.curvature(logits, labels, method=method, generator=signs)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        if pruner.step() and pruner.done:
            before = accuracy(thin.eval(), data)
            thin.train()
            pruner.scores.detach()
    return {"cut": before, "trained": accuracy(thin.eval(), data)}


SCHEDULES: dict[str, Callable[..., dict[str, float]]] = {
    "one-shot": _one_shot,
    "iterative": _iterative,
    "continuous": _continuous,
}
