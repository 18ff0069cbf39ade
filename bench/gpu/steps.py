"""Piece ``steps``: whole training steps on the device, each way of scoring interleaved, as ratios to plain.

Ways, models and steps are those of ``bench.steps``; the forward runs under autocast where the workload says so. Before
anything is timed, the plumbing is compared in float64 on small images, and the s that the timed models find in their
first step with that of multiplied gates in full float32: layer by layer at most twice as far as the timed dtype's own
multiplied gates are. Each timed step follows an untimed one of the same model.
"""

import functools
import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench import steps as cpu
from bench.gpu.device import Run
from bench.gpu.task import Task
from bench.gpu.timing import Stamped, stamped
from bench.pairs import WrongError, quartiles, ratios
from bench.steps import BY_NAME, EXPLICIT
from bench.ways import Scored, Way
from bench.workload import Workload

FACTOR, FLOOR = 2.0, 0.05  # of the timed dtype's own error, which comes of activations that change sides of a ReLU
SMALL = 8  # images of the comparison in float64
WAYS = [BY_NAME[name] for name in ("plain", "plain again", "hooks", "gates [1, C]", "scored", "fused", "fused, scored")]
RESNET50 = Workload("resnet50", 224, 256, 1000, pairs=12, device="cuda")
AMP = replace(RESNET50, autocast=torch.bfloat16)
WORKLOADS = [AMP, replace(AMP, batch=128), replace(RESNET50, batch=64)]
TINY = Workload("tiny", 8, 4, 5, pairs=3)
QUICK = [TINY, replace(TINY, autocast=torch.bfloat16)]


def run(task: Task) -> None:
    for w in workloads(task):
        if task.overdue():
            task.leave(str(subject(w)))
            continue
        task.add(measured(w, WAYS, task))
        forget()


def workloads(task: Task) -> list[Workload]:
    return [replace(w, device=task.device.kind) for w in (QUICK if task.quick else WORKLOADS)]


def subject(w: Workload) -> dict[str, object]:
    narrow = f"AMP {str(w.autocast).removeprefix('torch.')}" if w.autocast else str(w.dtype).removeprefix("torch.")
    return w.subject | {"precision": narrow}


def measured(w: Workload, ways: Sequence[Way], task: Task) -> list[dict[str, Any]]:
    """A row for every way, its time and its peak memory. Raises WrongError before anything is timed."""
    agreement = {way.name: plumbing(w, way) for way in ways}
    want, own = references(w)
    with tuned():
        steps, agreement = prepared(w, ways, agreement, want, own)
        found = stamped(steps, w.pairs, task.device, task.until)
        peaks = {name: task.device.peak(step) for name, step in steps.items()}
    return [row(w, way.name, "plain", found, peaks, agreement[way.name]) for way in ways]


def prepared(
    w: Workload, ways: Sequence[Way], agreement: Mapping[str, dict[str, float]], want: Scored, own: Scored
) -> tuple[dict[str, Run], dict[str, dict[str, float]]]:
    """The steps, each taken once, and how far their s are from what they should be."""
    steps: dict[str, Run] = {}
    told = {}
    for way in ways:
        ready = way.prepare(w)
        scores = cpu._first(ready)
        told[way.name] = agreement[way.name] | (agreeing(way.name, scores, want, own) if way.quantity == "s" else {})
        steps[way.name] = ready.step
    return steps, told


def row(
    w: Workload, name: str, to: str, found: Stamped, peaks: Mapping[str, int], checked: Mapping[str, float]
) -> dict[str, Any]:
    times = found.times
    return {
        "suite": "steps",
        "subject": subject(w),
        "way": name,
        "to": to,
        "pairs": len(times[name]),
        "ratio": quartiles(ratios(times[name], times[to])),
        "images/s": w.batch / statistics.median(times[name]),
        "launching": quartiles(ratios(found.launches[name], times[name])),
        "launched": quartiles(ratios(found.launches[name], found.launches[to])),
        "memory": peaks[name] / peaks[to] if peaks[to] else 1.0,
        "checked": dict(checked),
    }


def plumbing(w: Workload, way: Way) -> dict[str, float]:
    """The largest relative distance over layers in float64, of a small minibatch."""
    return _plumbing(replace(w, batch=min(w.batch, SMALL), autocast=None), way)


@functools.cache
def _plumbing(w: Workload, way: Way) -> dict[str, float]:
    return cpu.wide(w, way)


def references(w: Workload) -> tuple[Scored, Scored]:
    """s of gates that are really multiplied, of the timed weights and images: in full float32, and as timed."""
    with full_float32():
        want = cpu._first(EXPLICIT.prepare(replace(w, autocast=None)))
    own = cpu._first(EXPLICIT.prepare(w))
    forget()
    return want, own


def agreeing(name: str, scores: Scored, want: Scored, own: Scored) -> dict[str, float]:
    """Raises WrongError where a layer's s is too far from ``want`` beside how far ``own`` is."""
    found, torchs = cpu._distances(scores, want), cpu._distances(own, want)
    far = [(of, d, t) for of, d, t in zip(want, found, torchs, strict=True) if not d <= FACTOR * t + FLOOR]
    if far:
        raise WrongError(f"the timed {name}: layers, their distances and multiplied gates' own {far}; nothing is timed")
    return {"nearest layer": min(found), "its own": min(torchs), "layers": statistics.mean(found)} | {
        "layers' own": statistics.mean(torchs)
    }


@contextmanager
def tuned() -> Iterator[None]:
    """cuDNN tries its algorithms, as in most people's training; all models share what it finds."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 within."""
    settings: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def forget() -> None:
    cpu.reference.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
