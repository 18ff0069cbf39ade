"""``taylorkern score``: importances of all units of a network on some minibatches, without pruning."""

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import taylorkern as tk
from taylorkern.criteria import CRITERIA, criterion
from taylorkern.errors import CommandError
from taylorkern.files import replace
from taylorkern.gram import NEEDING_GRAM
from taylorkern.selection import asks_for_curvature

from . import sources, weights_file
from .checks import check_output
from .data import Data, open_data
from .learner import Learner
from .progress import say, say_skipped
from .settings import Settings


def score(options: Namespace) -> dict[str, Any]:
    """Score the network in evaluation mode and write ``options.out``; returns what a JSON file holds.

    "units" has for each unit its places, [layer, channel], and its importance by each criterion, null where a criterion
    can't judge it. A .safetensors file holds a tensor [U] of each criterion and "places" [P, 3] (unit, number of the
    layer, channel); its metadata have the layers' names, as JSON.

    Raises CommandError, before anything is scored, for a criterion that gives no importances, a file that can't be
    written and whatever does not fit; and where no image can be read.
    """
    out = Path(options.out)
    _check(out, options.criterion)
    settings = Settings(**{name: value for name, value in vars(options).items() if name in _SHARED})
    data = open_data(settings)
    model = sources.network(settings.model, len(data.classes), settings.seed)
    if settings.weights:
        weights_file.put(Path(settings.weights), weights_file.read(Path(settings.weights)), model)
    learner = Learner(model, data, settings)
    check_output(learner.model, learner.example(), len(data.classes))
    scores = tk.Scores(learner.model, learner.example(), criteria=options.criterion, seed=settings.seed)
    skipped = _collect(scores, learner, options.criterion, _within_an_epoch(options.batches, data))
    if not scores.minibatches and not scores.dropped:
        raise CommandError(f"no image of --data {settings.data} can be read; look at the files named above")
    importances = {name: scores.importance(name).cpu() for name in options.criterion}
    result = _result(scores, data, importances, skipped)
    replace(out, WRITERS[out.suffix](scores, importances, result))
    return result


_SHARED = ("model", "data", "weights", "size", "batch", "workers", "val_share", "augment", "device", "seed")


def _check(out: Path, criteria: list[str]) -> None:
    if out.suffix not in WRITERS:
        raise CommandError(f"--out {out} must end in {' or '.join(WRITERS)}")
    if not out.parent.is_dir() or out.is_dir():
        raise CommandError(f"--out {out}: no file can be there; make the folder {out.parent}, or give another name")
    if not criteria:
        raise CommandError(f"--criterion names none; known are {', '.join(CRITERIA)}")
    for name in criteria:
        if name in NEEDING_GRAM:
            raise CommandError(f"--criterion {name} chooses sets, so no unit has an importance by it; give another")
        criterion(name)


def _within_an_epoch(batches: int, data: Data) -> int:
    if batches > data.per_epoch:
        say(f"--batches {batches} is more than an epoch; all {data.per_epoch} minibatches are taken, each once")
    return min(batches, data.per_epoch)


def _collect(scores: tk.Scores, learner: Learner, criteria: list[str], batches: int) -> dict[str, str]:
    skipped: dict[str, str] = {}
    curved = any(asks_for_curvature(name) for name in criteria)
    signs = torch.Generator(learner.device).manual_seed(learner.settings.seed)
    learner.model.eval()
    stream = learner.data.train(0)
    for images, labels, left_out in tqdm(islice(stream, batches), total=batches, desc="score", unit="step"):
        for file, why in left_out:
            say_skipped(file, why, len(skipped))
            skipped[file] = why
        if not len(labels):
            continue
        labels = labels.to(learner.device)
        learner.model.zero_grad()
        logits = learner.model(learner.ready(images))
        if curved:
            scores.curvature(logits, labels, generator=signs)
        F.cross_entropy(logits, labels).backward()
    return skipped


def _result(scores: tk.Scores, data: Data, importances: dict[str, Tensor], skipped: dict[str, str]) -> dict[str, Any]:
    columns = {name: [_plain(value) for value in importance.tolist()] for name, importance in importances.items()}
    return {
        "criteria": list(columns),
        "minibatches": scores.minibatches,
        "dropped": scores.dropped,
        "classes": data.classes,
        "skipped": [{"file": file, "why": why} for file, why in skipped.items()],
        "layers": _layers(scores),
        "units": [
            {"places": [list(place) for place in unit.places], **{name: columns[name][i] for name in columns}}
            for i, unit in enumerate(scores.units)
        ],
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _layers(scores: tk.Scores) -> list[str]:
    return list(dict.fromkeys(layer for unit in scores.units for layer, _ in unit.places))


def _as_json(scores: tk.Scores, importances: dict[str, Tensor], result: dict[str, Any]) -> bytes:
    return (json.dumps(result, indent=1) + "\n").encode()


def _as_safetensors(scores: tk.Scores, importances: dict[str, Tensor], result: dict[str, Any]) -> bytes:
    number = {layer: i for i, layer in enumerate(result["layers"])}
    places = [[i, number[layer], channel] for i, unit in enumerate(scores.units) for layer, channel in unit.places]
    tensors = {**importances, "places": torch.tensor(places, dtype=torch.int64)}
    return safetensors.torch.save(tensors, {"layers": json.dumps(result["layers"])})


WRITERS = {".json": _as_json, ".safetensors": _as_safetensors}


def tell(result: Mapping[str, Any]) -> str:
    """A few lines about the result of :func:`score`."""
    lines = [f"{len(result['units']):,} units of {len(result['layers'])} layers, {result['minibatches']} minibatches"]
    for name in result["criteria"]:
        known = sorted(unit[name] for unit in result["units"] if unit[name] is not None)
        if known:
            middle = known[len(known) // 2]
            lines.append(f"{name:<18} least {known[0]:.3g}, median {middle:.3g}, most {known[-1]:.3g}")
    return "\n".join(lines)
