"""Accuracy without fine-tuning against the share of channels removed: at once, or round by round with new scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import taylorkern as tk
from taylorkern.budget import removable
from taylorkern.channels import channel_dim
from taylorkern.coupling import Coupling
from taylorkern.demo.data import Digits

from .plan import Plan
from .scoring import STATIC, VARIANTS, Batches, accumulate


@contextmanager
def masked(model: nn.Module, layers: dict[str, Tensor], mask: Tensor) -> Iterator[None]:
    """Within, the outputs of unit u's channels are multiplied by ``mask`` [U]; a change of ``mask`` takes effect."""

    def hook(units: Tensor) -> Callable:
        def multiply(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            shape = [-1 if d == channel_dim(module, output) else 1 for d in range(output.dim())]
            return output * torch.cat([mask, mask.new_ones(1)])[units].view(shape)  # -1: channels of no unit

        return multiply

    handles = [model.get_submodule(layer).register_forward_hook(hook(units)) for layer, units in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pools(scores: tk.Scores, layer: str) -> dict[str, Tensor]:
    """Which units may go: any; those no shortcut or concatenation shares between layers; those of one layer."""
    places = [unit.places for unit in scores.units]
    inner = [u for u, of_unit in enumerate(places) if len(of_unit) == 1]
    return {
        "whole network": torch.arange(len(places)),
        "inner channels": torch.tensor(inner),
        "one layer": torch.tensor([u for u in inner if places[u][0][0] == layer]),
    }


def lowest(importance: Tensor, pool: Tensor, count: int, coupling: Coupling, gone: Tensor) -> Tensor:
    """The ``count`` least important units of ``pool`` beside those ``gone`` [U], none the last of a layer."""
    limited = torch.full_like(importance, torch.inf)
    limited[pool] = importance[pool]
    limited[gone] = -torch.inf
    order = removable(limited, coupling, min_channels=1)
    return order[~gone[order]][:count]


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Held-out accuracy, in the mode the model is in."""
    return float((model(data.test_images).argmax(1) == data.test_labels).double().mean())


def at_once(
    scores: tk.Scores, ranked: dict[str, Tensor], pool: Tensor, fractions: tuple[float, ...], data: Digits
) -> dict[str, list[float]]:
    """Accuracy at each of ``fractions`` of ``pool`` removed by each importance, taken once with all units there.

    Importances that are infinite somewhere in ``pool`` are left out: their criterion can't judge this network.
    """
    mask = torch.ones(len(scores.units))
    nothing = torch.zeros(len(mask), dtype=torch.bool)
    curves: dict[str, list[float]] = {}
    with masked(scores.model, scores.coupling.layers, mask):
        for name, importance in ranked.items():
            if not importance[pool].isfinite().all():
                continue
            curves[name] = []
            for fraction in fractions:
                mask.fill_(1)
                mask[lowest(importance, pool, round(fraction * len(pool)), scores.coupling, nothing)] = 0
                curves[name].append(accuracy(scores.model, data))
    return curves


def round_by_round(
    scores: tk.Scores, batches: Batches, pool: Tensor, plan: Plan, data: Digits, seed: int
) -> dict[str, list[float]]:
    """The same with new scores after every 1/rounds of ``pool``, for every criterion that looks at data."""
    curves: dict[str, list[float]] = {}
    mask = torch.ones(len(scores.units))
    with masked(scores.model, scores.coupling.layers, mask):
        for name, variant in VARIANTS.items():
            if name in STATIC or variant.method not in (None, "sketch") or variant.draws > 1:
                continue
            mask.fill_(1)
            curve: dict[int, float] = {}
            wanted = [round(fraction * plan.rounds) for fraction in plan.fractions]
            for done in range(1, max(wanted) + 1):
                accumulate(scores, batches, variant.method, seed + done)
                importance = scores.importance(variant.criterion)
                if not importance[pool].isfinite().all():
                    break
                count = round(done / plan.rounds * len(pool)) - int((mask == 0).sum())
                mask[lowest(importance, pool, count, scores.coupling, mask == 0)] = 0
                if done in wanted:
                    curve[done] = accuracy(scores.model, data)
            if curve:
                curves[name] = [curve[done] for done in wanted]
    return curves
