"""A run's figures: the dense and the pruned network side by side, and everything that led from one to the other."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import taylorkern as tk
from taylorkern.demo import measure

from . import latency
from .learner import Learner
from .record import Record

LATENCY_BATCH, LATENCY_ROUNDS = 8, 15


def summarise(
    learner: Learner, record: Record, dense: nn.Module, pruned: nn.Module, quality: Mapping[str, float]
) -> dict[str, Any]:
    """The content of summary.json. ``quality`` is the pruned network's accuracy and loss, the dense one's is recorded.

    The ``dense`` network serves for sizes and speed alone, so its weights may be any.
    """
    settings, data = learner.settings, learner.data
    models = {"dense": dense.eval(), "pruned": pruned.eval()}
    image = learner.example()
    times = latency.compare(models, image.expand(LATENCY_BATCH, *image.shape[1:]).contiguous(), LATENCY_ROUNDS)
    sizes = {name: measure.size(model, image) for name, model in models.items()}
    first = {**record.dense, **sizes["dense"], "latency_ms": times["dense"]}
    last = {**quality, **sizes["pruned"], "latency_ms": times["pruned"]}
    return {
        "command": settings.command,
        "versions": {"taylorkern": tk.__version__, "torch": torch.__version__},
        "settings": {
            **asdict(settings),
            "epochs": settings.training_epochs,
            "lr": settings.peak,
            "weight_decay": settings.decay,
        },
        "device": str(learner.device),
        "threads": torch.get_num_threads(),
        "classes": data.classes,
        "images": {**data.counts, "skipped": [{"file": file, "why": why} for file, why in record.skipped.items()]},
        "warnings": list(data.warnings),
        "dense": first,
        "pruned": last,
        "ratios": {key: last[key] / first[key] for key in ("params", "flops", "latency_ms")},
        "accuracy_lost": first["accuracy"] - last["accuracy"],
        "latency_batch": LATENCY_BATCH,
        "widths": {name: widths(model) for name, model in models.items()},
        "history": record.history,
        "ranks": record.ranks,
        "criterion": settings.criterion,
        "target": settings.target,
        "of": settings.of,
        "dropped": record.dropped,
        "empty": record.empty,
    }


def widths(model: nn.Module) -> dict[str, int]:
    """Outputs of every layer with a weight of two dimensions or more, in the network's order.

    >>> widths(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 2)))
    {'0': 8, '2': 2}
    """
    found = {}
    for name, module in model.named_modules():
        outputs = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
        if isinstance(outputs, int) and getattr(module, "weight", None) is not None:
            found[name] = outputs
    return found
