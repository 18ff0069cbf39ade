"""Every criterion's importances of one network on fixed minibatches; those with a curvature once per method."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylorkern as tk

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Variant:
    """A criterion, and for those that need a curvature the method that it is computed by."""

    criterion: str
    method: str | None = None
    draws: int = 1


VARIANTS: dict[str, Variant] = {
    "taylor_fo": Variant("taylor_fo"),
    "taylor_fo_abs": Variant("taylor_fo_abs"),
    "taylor_fg": Variant("taylor_fg"),
    "taylor_so": Variant("taylor_so", "sketch"),
    "taylor_so (4 sketches)": Variant("taylor_so", "sketch", 4),
    "taylor_so (mc)": Variant("taylor_so", "mc"),
    "taylor_so (4 mc)": Variant("taylor_so", "mc", 4),
    "taylor_so (exact)": Variant("taylor_so", "exact"),
    "taylor_so_fisher": Variant("taylor_so_fisher"),
    "obd": Variant("obd", "sketch"),
    "taylor_output": Variant("taylor_output"),
    "taylor_weight": Variant("taylor_weight"),
    "bn_taylor": Variant("bn_taylor"),
    "bn_scale": Variant("bn_scale"),
    "magnitude": Variant("magnitude"),
    "random": Variant("random"),
}
STATIC = ("bn_scale", "magnitude", "random")  # of the weights alone: no data, nothing changes while units go


def scorer(model: nn.Module, batches: Batches, seed: int) -> tk.Scores:
    """A Scores on ``model``, converted here, that can answer for every variant."""
    return tk.Scores(tk.convert(model), batches[0][0][:1], criteria=["taylor_output", "taylor_weight"], seed=seed)


def accumulate(scores: tk.Scores, batches: Batches, method: str | None, seed: int, draws: int = 1) -> None:
    """The statistics of ``batches`` alone, the model left untrained and in its mode."""
    generator = torch.Generator().manual_seed(seed)
    scores.reset()
    for images, labels in batches:
        logits = scores.model(images)
        if method is not None:
            scores.curvature(logits, labels, method=method, draws=draws, generator=generator)
        F.cross_entropy(logits, labels).backward()
    scores.fold()
    scores.model.zero_grad()


def importances(scores: tk.Scores, batches: Batches, seed: int) -> dict[str, Tensor]:
    """[U] per variant; infinite where a criterion can't judge a unit."""
    found: dict[str, Tensor] = {}
    ways = {(variant.method, variant.draws) for variant in VARIANTS.values() if variant.method}
    for method, draws in sorted(ways):
        accumulate(scores, batches, method, seed, draws)
        found |= {
            name: scores.importance(variant.criterion)
            for name, variant in VARIANTS.items()
            if variant.method is None or (variant.method, variant.draws) == (method, draws)
        }
    return {name: found[name] for name in VARIANTS}
