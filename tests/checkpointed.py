"""A training with everything that has a state, kept in checkpoints; also a program to kill: its folder and steps."""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taylorkern as tk
from tests.killing import STARTED

EXAMPLE = torch.zeros(2, 2, 8, 8)


def network() -> nn.Module:
    layers = [nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU()]
    return tk.convert(nn.Sequential(*layers, nn.Dropout(0.3), nn.Flatten(), nn.Linear(160, 5)))


class Training:
    """SGD with momentum under OneCycleLR, a moving average, dropout, and noise from every generator there is."""

    def __init__(self, folder: Path, steps: int = 30, **options) -> None:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        self.steps, self.done_steps = steps, 0
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=steps + 1)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.generator = torch.Generator().manual_seed(1)
        options = {"target": 0.4, "every": 4, "step": 1} | options
        self.every_n, self.batch = options.pop("every_n", 0), options.pop("batch", 6)
        self.pruner = tk.Pruner(self.model, EXAMPLE, optimizer=self.optimizer, copies=self.average, **options)
        self.checkpoints = tk.Checkpoints(folder, **self.parts())

    def parts(self):
        names = ("scheduler", "optimizer", "average", "model", "generator", "pruner")  # load() knows the right order
        return {name: getattr(self, name) for name in names}

    def run(self, until: int | None = None, every: int = 3) -> "Training":
        for step in range(self.done_steps, self.steps if until is None else until):
            self.step()
            self.done_steps = step + 1
            if every and not self.done_steps % every:
                self.checkpoints.save(self.done_steps)
        return self

    def step(self) -> None:
        x = torch.randn(self.batch, 2, 8, 8, generator=self.generator) + 0.1 * random.random() + 0.1 * np.random.rand()
        labels = torch.randint(5, (self.batch,))
        self.optimizer.zero_grad()
        logits = self.model(x)
        if self.every_n:
            self.pruner.scores.curvature(logits, labels, every_n=self.every_n)
        nn.functional.cross_entropy(logits, labels).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.pruner.step()
        self.average.update_parameters(self.model)

    def resume(self) -> "Training":
        found = self.checkpoints.load()
        self.done_steps = found["step"] if found else 0
        return self


class Linear:
    """A model that learns nothing, and its checkpoints."""

    def __init__(self, folder, value=0.0, **options) -> None:
        self.model = nn.Linear(3, 2)
        nn.init.constant_(self.model.weight, value)
        self.checkpoints = tk.Checkpoints(folder, model=self.model, **options)

    def saved(self, *steps) -> "Linear":
        self.checkpoints.load()
        for step in steps:
            nn.init.constant_(self.model.weight, step)
            self.checkpoints.save(step)
        return self


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    """Both states hold the same things, to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(one, other, f"{where}[{number}]")
    else:
        assert a == b, where


def main(folder: str, steps: str) -> None:
    training = Training(Path(folder), int(steps)).resume()
    print(STARTED, flush=True)
    training.run()
    training.checkpoints.save(training.done_steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
