"""Accuracy and loss on held-out images."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern.errors import CommandError

from .learner import Learner
from .loader import Minibatch, Skip

PER_ROUND = 2000  # images looked at after a round of pruning


def evaluate(
    learner: Learner,
    minibatches: Iterator[Minibatch],
    note: Callable[[list[Skip]], None],
    model: nn.Module | None = None,
) -> dict[str, float]:
    """Accuracy (0 to 1) and mean cross-entropy of ``model`` (by default the learner's), in evaluation mode.

    Files that can't be read are given to ``note`` and don't count. Raises CommandError where not one is left.
    """
    network = learner.model if model is None else model
    training, right, lost, seen = network.training, 0, 0.0, 0
    network.eval()
    with torch.inference_mode(), learner.precision():
        for images, labels, skipped in minibatches:
            note(skipped)
            if not len(labels):
                continue
            logits: Tensor = network(learner.ready(images)).float()
            labels = labels.to(learner.device)
            right += int((logits.argmax(1) == labels).sum())
            lost += float(F.cross_entropy(logits, labels, reduction="sum"))
            seen += len(labels)
    network.train(training)
    if not seen:
        raise CommandError("not one held-out image can be read; look at the files that are named above")
    return {"accuracy": right / seen, "loss": lost / seen}
