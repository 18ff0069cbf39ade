"""What the matrix foretells for sets of units that go at once, beside what was measured."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.study.removal import masked
from taylorkern.gram import Block
from taylorkern.surgeon import shift

from .thinning import Thinning
from .ways import COMPENSATED, SURGEON, Way

CHOSEN_BY = ("surgeon", "taylor_fo", "random")
BATCH = 256


def foretold(thinning: Thinning, pool: Tensor) -> list[dict[str, Any]]:
    """For sets chosen one-shot, bare and made up for: ½ dᵀHd, with G·d, and ΔL on scored and on held-out images."""
    thinning.restore()
    thinning.score(SURGEON, round_=1)
    blocks, gradient = thinning.scores.gram("full"), -thinning.scores.predicted_change("taylor_fo")
    before = losses(thinning)
    found = []
    for fraction in thinning.plan.predicted:
        for criterion in CHOSEN_BY:
            thinning.restore()
            removed = thinning.chosen(Way(criterion), pool, round(fraction * len(pool)))
            for made_up in (False, True):
                bare = torch.zeros_like(gradient).index_fill(0, removed, -1)
                d = shift(blocks, removed) if made_up else bare
                thinning.gates.copy_(1 + d)
                second = second_order(blocks, d)
                scored, held_out = (after - was for after, was in zip(losses(thinning), before, strict=True))
                found.append({
                    "set": criterion + (COMPENSATED if made_up else ""), "fraction": fraction,
                    "second": second, "both": second + float(gradient @ d), "scored": scored, "held out": held_out,
                })  # fmt: skip
    return found


def second_order(blocks: list[Block], d: Tensor) -> float:
    """½ dᵀHd."""
    return sum(float(d[block.units] @ block.matrix @ d[block.units]) for block in blocks) / 2


@torch.no_grad()
def losses(thinning: Thinning) -> tuple[float, float]:
    """Mean cross-entropy on the scored images and on the held-out ones."""
    data = thinning.data
    scored = [torch.cat(tensors) for tensors in zip(*thinning.batches, strict=True)]
    with masked(thinning.model, thinning.coupling.layers, thinning.gates):
        return _loss(thinning, *scored), _loss(thinning, data.test_images, data.test_labels)


def _loss(thinning: Thinning, images: Tensor, labels: Tensor) -> float:
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return sum(float(F.cross_entropy(thinning.model(x), y, reduction="sum")) for x, y in pairs) / len(labels)
