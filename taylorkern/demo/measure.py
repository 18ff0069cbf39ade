"""What the dense and the pruned network are compared by, each figure measured on the networks themselves."""

import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@torch.inference_mode()
def held_out(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy (0 to 1) and mean cross-entropy in evaluation mode; the model's mode is put back."""
    training = model.training
    logits = model.eval()(images)
    model.train(training)
    return {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
    }


def size(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Parameters, and the FLOPs of one forward of ``image`` [1, ...] as torch's own counter sees them."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
    }


@torch.inference_mode()
def latencies(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of one forward per model, the models taking turns under the same noise."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for timed in [False] * 5 + [True] * rounds:
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if timed:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(taken) for name, taken in times.items()}


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution, in the network's order."""
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return {name: module.out_channels for name, module in convolutions}
