"""What a job needs of the device and of the network, looked at before anything is trained."""

import torch
from torch import Tensor, nn

from taylorkern.errors import CommandError, one_line
from taylorkern.state import untouched


def usable(named: str) -> torch.device:
    """The device called ``named``; raises CommandError where this machine, or this torch, can't compute there.

    >>> usable("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(named)
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # each kind of device has its own
        raise CommandError(f"--device {named} can't be used: {one_line(error)}; give cpu, or auto") from error
    return device


def check_output(model: nn.Module, example: Tensor, classes: int) -> None:
    """Raise CommandError where ``model`` does not give a tensor [1, classes] for ``example`` [1, ...].

    It runs in evaluation mode, and is afterwards as it was.
    """
    shape = list(example.shape)
    try:
        with torch.no_grad(), untouched(model):
            given = model.eval()(example)
    except Exception as error:  # whatever the user's network raises
        told = f"{type(error).__name__}: {one_line(error)}"
        raise CommandError(f"the network of --model fails on an input {shape} ({told}); look at --size") from error
    if not isinstance(given, Tensor):
        raise CommandError(f"the network of --model gives a {type(given).__name__}; it must return the logits alone")
    if list(given.shape) != [1, classes]:
        raise CommandError(
            f"the network of --model gives {list(given.shape)} for an input {shape}, and there are {classes} classes, "
            f"so [1, {classes}] is needed: have it made for the number of classes (a parameter num_classes), or, of a "
            "function's data, name all classes in train.classes"
        )


def check_labels(where: str, labels: Tensor) -> None:
    """Raise CommandError where ``labels`` are not whole numbers [N] from 0 on; ``where`` they are from begins it."""
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        told = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise CommandError(f"{where} has labels of {told}; whole numbers [N] are needed, the classes'")
    if len(labels) and int(labels.min()) < 0:
        raise CommandError(f"{where} has the label {int(labels.min())}; classes are counted from 0")
