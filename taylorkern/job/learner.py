"""The learner: network, optimiser and scaler, and what one minibatch does to them."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylorkern as tk
from taylorkern.selection import asks_for_curvature

from .checks import usable
from .data import Data
from .settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {
    "sgd": lambda parameters, settings: torch.optim.SGD(
        parameters, settings.peak, momentum=0.9, nesterov=True, weight_decay=settings.decay
    ),
    "adamw": lambda parameters, settings: torch.optim.AdamW(parameters, settings.peak, weight_decay=settings.decay),
}


class Learner:
    """Trains ``model`` (converted and moved to the device here) on minibatches of ``data``."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings) -> None:
        self.settings, self.data, self.device = settings, data, device(settings.device)
        self.model = tk.convert(model).to(self.device)
        if settings.channels_last:
            self.model = cast(Any, self.model).to(memory_format=torch.channels_last)
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[settings.optimizer](self.model.parameters(), settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self._forward: Callable[[Tensor], Tensor] = self.model

    def compiled(self, wanted: bool) -> None:
        """Whether forwards are compiled from now on. They aren't while channels go: every cut would compile anew."""
        self._forward = torch.compile(self.model) if wanted and self.settings.compile else self.model

    def ready(self, images: Tensor) -> Tensor:
        """A minibatch as the network takes it."""
        batch = self.data.ready(images.to(self.device))
        return batch.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else batch

    def example(self) -> Tensor:
        """One image [1, ...] to look through the network with: noise, the same in every run."""
        noise = torch.randn(1, *self.data.shape(), generator=torch.Generator().manual_seed(0))
        return noise.to(self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """What forwards run in."""
        amp = self.settings.amp
        return torch.autocast(self.device.type, DTYPES.get(amp, torch.bfloat16), enabled=amp != "off")

    def learn(self, images: Tensor, labels: Tensor, rate: float, scores: tk.Scores | None, step: int) -> float:
        """One step on a minibatch; returns its loss. ``scores`` get a curvature where their criterion asks for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = labels.to(self.device)
        self.optimizer.zero_grad()
        self.model.train()
        with self.precision():
            logits = self._forward(self.ready(images))
            loss = F.cross_entropy(logits.float(), labels)
        if scores is not None and asks_for_curvature(self.settings.criterion):
            scores.curvature(logits, labels, generator=self._signs(step))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.detach())

    def _signs(self, step: int) -> torch.Generator:
        drawn = random.Random(f"signs {self.settings.seed} {step}").getrandbits(63)
        return torch.Generator(self.device).manual_seed(drawn)


def device(named: str) -> torch.device:
    """The device called ``named``; "auto" is the accelerator where there is one. CommandError where it can't be used.

    >>> device("cpu")
    device(type='cpu')
    """
    if named != "auto":
        return usable(named)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
