"""The demo's network at a quarter of its widths, trained within seconds, for ``taylorkern oracle``."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import digits, minibatches
from .network import WIDTHS, DigitsNet

BATCH = 64
STEPS, QUICK_STEPS = 300, 60
NARROW = tuple(width // 4 for width in WIDTHS)
PEAK = 0.05  # learning rate


def network(seed: int, quick: bool = False) -> nn.Module:
    """A narrow :class:`DigitsNet` after ``STEPS`` minibatches; the same seed gives the same bits."""
    torch.manual_seed(seed)
    model, steps = DigitsNet(NARROW), QUICK_STEPS if quick else STEPS
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps)
    stream = batches(seed)
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training minibatches (images [64, 1, 8, 8], labels [64]) for ever."""
    return minibatches(digits(), BATCH, torch.Generator().manual_seed(seed))
