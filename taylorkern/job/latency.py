"""How long networks take, timed in turns, so that a disturbance meets all of them alike."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from statistics import median

import torch
from torch import Tensor, nn

from taylorkern.state import untouched

WARM_UP = 5  # rounds that are run and not timed


@torch.inference_mode()
def compare(models: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of one forward of ``images`` [N, ...] per model, in evaluation mode, over ``rounds`` turns.

    The models and ``images`` are on one device, which is waited for. Modes and buffers are put back afterwards.
    Raises ValueError for ``rounds`` below 1.

    >>> sorted(compare({"wide": nn.Linear(9, 9), "narrow": nn.Linear(9, 1)}, torch.zeros(2, 9), rounds=3))
    ['narrow', 'wide']
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(untouched(model))
            model.eval()
        for timed in [False] * WARM_UP + [True] * rounds:
            for name, model in models.items():
                taken = _once(model, images)
                if timed:
                    times[name].append(taken)
    return {name: 1e3 * median(taken) for name, taken in times.items()}


def _once(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward; what the device still has to do from before is not counted."""
    _wait(images)
    start = time.perf_counter()
    model(images)
    _wait(images)
    return time.perf_counter() - start


def _wait(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
