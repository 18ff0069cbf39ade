"""What the dense and the pruned network are compared by, each figure measured on the networks themselves."""

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


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution, in the network's order."""
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return {name: module.out_channels for name, module in convolutions}
