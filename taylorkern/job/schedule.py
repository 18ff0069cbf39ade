"""Learning rates as a function of phase and step alone, so that a run that goes on has the same."""

import math
from collections.abc import Callable

WARM_UP = 20  # steps


def cosine(step: int, steps: int) -> float:
    """From 1 to 0 in half a cosine, after a warm-up of ``WARM_UP`` steps or a tenth of all.

    >>> [round(cosine(step, 10), 2) for step in (0, 5, 9)]
    [1.0, 0.5, 0.02]
    """
    return constant(step, steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def constant(step: int, steps: int) -> float:
    """1 after a warm-up."""
    return min(1.0, (step + 1) / max(1, min(WARM_UP, steps // 10)))


SHAPES: dict[str, tuple[float, Callable[[int, int], float]]] = {
    "train": (1.0, cosine),
    "prune": (0.4, constant),
    "finetune": (0.5, cosine),
}


def rate(phase: str, peak: float, step: int, steps: int) -> float:
    """The learning rate in ``step`` (from 0) of a phase of ``steps``: pruning runs at 0.4 of ``peak``, fine-tuning
    begins at half of it.

    >>> rate("train", 0.1, 50, 100), rate("prune", 0.1, 50, 100)
    (0.05, 0.04000000000000001)
    """
    share, shape = SHAPES[phase]
    return peak * share * shape(step, steps)
