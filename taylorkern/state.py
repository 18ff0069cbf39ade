"""Running a model without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its first name; one that has several names appears once."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise ValueError(f"{name} is not initialised yet: run the model once, then couple it")
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within, the model may run in any mode; afterwards its modes, buffers and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    devices = {t.device.index or 0 for t in model.parameters() if t.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def replace_data(tensor: Tensor, data: Tensor, gradient: Tensor | None = None) -> None:
    """Give a parameter or buffer other data and another gradient, of any shape, without changing its identity."""
    if tensor.is_leaf:
        tensor.grad = None
    # A living graph keeps the accumulator of the old shape, which torch replaces only where the dtype changes.
    passing = torch.float32 if data.dtype == torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=passing, device=data.device)
    tensor.data = data
    if gradient is not None:
        tensor.grad = gradient
