"""Train, score while training goes on, prune bit by bit, fine-tune, save, load again, compare."""

import copy
import math
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import taylorkern as tk
from taylorkern.job import latency, ranks
from taylorkern.selection import asks_for_curvature, selection

from . import measure
from .data import Digits, digits, minibatches
from .network import DigitsNet

BATCH = 64


@dataclass(frozen=True)
class Plan:
    """How long each phase is, in minibatches of 64 images, and how the pruner works."""

    dense: int
    finetune: int
    every: int
    step: int
    criterion: str = "taylor_fo"
    compensate: bool | None = None  # None: where the surgeon chooses
    target: float = 0.25
    learning_rate: float = 0.05
    pruning_rate: float = 0.02
    latency_rounds: int = 100


FULL = Plan(dense=500, finetune=400, every=15, step=40)
QUICK = Plan(dense=150, finetune=100, every=5, step=80, latency_rounds=30)


@dataclass
class Demo:
    """The job's state: one network, one optimiser, one stream of minibatches from first to last."""

    plan: Plan
    seed: int
    data: Digits = field(default_factory=digits)
    history: list[dict[str, float]] = field(default_factory=list)
    importance: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = tk.convert(DigitsNet())
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.plan.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.batches = minibatches(self.data, BATCH, torch.Generator().manual_seed(self.seed))
        self.signs = torch.Generator().manual_seed(self.seed)

    def train(self, name: str, steps: int, peak: float) -> None:
        """``steps`` minibatches, the rate falling from ``peak`` to 0 in half a cosine after a warm-up."""
        for i in tqdm(range(steps), desc=name, unit="step"):
            warm = min(1.0, (i + 1) / 20)
            self._learn(peak * warm * 0.5 * (1 + math.cos(math.pi * i / steps)))

    def prune(self) -> None:
        """Training goes on at a constant rate; the pruner removes the least important channels as it goes."""
        plan = self.plan
        pruner = tk.Pruner(
            self.model,
            self.data.train_images[:1],
            optimizer=self.optimizer,
            criterion=plan.criterion,
            compensate=plan.compensate,
            target=plan.target,
            of="flops",
            every=plan.every,
            step=plan.step,
        )
        self._record(pruner)
        with tqdm(total=100, desc="score and prune", unit="%", bar_format="{l_bar}{bar}| {postfix}") as bar:
            while not pruner.done:
                self._learn(plan.pruning_rate, pruner.scores if asks_for_curvature(plan.criterion) else None)
                if not self.importance and pruner.scores.minibatches == plan.every:
                    self.importance = ranks.importances(pruner.scores, plan.criterion)
                if pruner.step():
                    self._record(pruner)
                    accuracy = self.history[-1]["accuracy"]
                    bar.set_postfix_str(f"FLOPs {pruner.kept:.0%}, accuracy {accuracy:.1%}")
                    bar.update(min(100, 100 * (1 - pruner.kept) / (1 - plan.target)) - bar.n)
        pruner.scores.detach()

    def _learn(self, rate: float, curved: tk.Scores | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, labels = next(self.batches)
        self.optimizer.zero_grad()
        logits = self.model.train()(images)
        if curved is not None:
            curved.curvature(logits, labels, generator=self.signs)
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()

    def _record(self, pruner: tk.Pruner) -> None:
        quality = measure.held_out(self.model, self.data.test_images, self.data.test_labels)
        self.history.append({"channels": len(pruner.scores.units), "flops_kept": pruner.kept, **quality})


def run(
    *,
    quick: bool = False,
    seed: int = 0,
    out: Path | None = None,
    criterion: str | None = None,
    compensate: bool | None = None,
) -> dict[str, Any]:
    """Do the whole job; returns the summary, and leaves ``pruned.safetensors`` and pictures in ``out``.

    ``criterion`` in place of the plan's, with ``compensate`` as in :class:`taylorkern.Pruner`. Progress goes to stderr.
    Raises OSError or StoreError where ``out`` can't be written, ValueError for an unknown criterion.
    """
    plan = QUICK if quick else FULL
    plan = replace(plan, criterion=criterion or plan.criterion, compensate=compensate)
    selection(plan.criterion)  # an unknown one is refused before the training
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        demo = Demo(plan, seed)
        demo.train("train", demo.plan.dense, demo.plan.learning_rate)
        dense = copy.deepcopy(demo.model).eval()
        demo.prune()
        demo.train("fine-tune", demo.plan.finetune, demo.plan.learning_rate / 2)
        pruned = _saved_and_loaded(demo.model.eval(), folder / "pruned.safetensors", demo.data.test_images)
        summary = _compare(demo, {"dense": dense, "pruned": pruned})
        if out:
            from taylorkern import report

            report.draw(summary, folder)
    return summary


def _saved_and_loaded(model: nn.Module, path: Path, images: Tensor) -> nn.Module:
    """The network as a fresh dense one reads it; raises RuntimeError unless it computes the same."""
    tk.save(model, path)
    loaded = tk.load(path, DigitsNet()).eval()
    with torch.inference_mode():
        if not torch.equal(loaded(images), model(images)):
            raise RuntimeError(f"the network loaded from {path} is not the one that was saved")
    return loaded


def _compare(demo: Demo, models: dict[str, nn.Module]) -> dict[str, Any]:
    test, labels = demo.data.test_images, demo.data.test_labels
    milliseconds = latency.compare(models, test[:BATCH], demo.plan.latency_rounds)
    figures = {
        name: {
            **measure.held_out(model, test, labels),
            **measure.size(model, test[:1]),
            "latency_ms": milliseconds[name],
        }
        for name, model in models.items()
    }
    dense, pruned = figures["dense"], figures["pruned"]
    return {
        **figures,
        "ratios": {key: pruned[key] / dense[key] for key in ("params", "flops", "latency_ms")},
        "accuracy_lost": dense["accuracy"] - pruned["accuracy"],
        "held_out_images": len(labels),
        "latency_batch": BATCH,
        "seed": demo.seed,
        "plan": asdict(demo.plan),
        "versions": {"taylorkern": tk.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "widths": {name: measure.widths(model) for name, model in models.items()},
        "history": demo.history,
        "importance": demo.importance,
        "ranked_by": ranks.ranking(demo.plan.criterion),
    }
