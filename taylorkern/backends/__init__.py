"""The provider table: which backend serves an operation on a device. The only place that chooses."""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from .. import ops
from . import choice, cuda, native, reference, triton_operations

OPERATIONS = ("channel_scores", "batch_norm_act", "batch_norm_act_backward")
Provider = ModuleType | cuda.Kernels

# Per device, best first where nothing is measured. The first provider whose supports(operation, tensor) holds serves
# the call, after the one that ``choice`` has found to be the fastest on this GPU for such a tensor.
PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "cpu": (native, reference),
    "cuda": (cuda.streamed, cuda.resident, triton_operations, reference),
}


def provider(operation: str, tensor: Tensor) -> Provider:
    """The backend that serves ``operation`` for tensors of this device, dtype, layout and size."""
    fastest = choice.on(tensor.device).of(operation, tensor) if tensor.is_cuda else None
    for backend in _beginning_with(fastest, PROVIDERS[tensor.device.type]):
        if backend.supports(operation, tensor):
            return backend
    raise NotImplementedError(f"no backend serves {operation} for {tensor.dtype} on {tensor.device}")


def name(backend: Provider) -> str:
    """What tables and measurements call a backend.

    >>> name(native), name(cuda.resident)
    ('native', 'cuda resident')
    """
    return backend.__name__.rpartition(".")[2]


@cache
def _beginning_with(fastest: str | None, providers: tuple[Provider, ...]) -> tuple[Provider, ...]:
    return tuple(sorted(providers, key=lambda backend: fastest is not None and name(backend) != fastest))


_SUBJECT = {"batch_norm_act_backward": 1}  # which argument decides, if not the first: x, as in the forward


def _serve(operation: str) -> Callable:
    subject = _SUBJECT.get(operation, 0)

    def call(*arguments: Any) -> Any:
        return getattr(provider(operation, arguments[subject]), operation)(*arguments)

    return call


def follow(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
) -> None:
    """Move running statistics [C] by ``momentum`` towards a batch's, whose ``var`` times ``unbias`` is unbiased.

    In place and without autograd noticing, as torch's own forward does it; never part of a compiled graph.
    """
    given = (running_mean, running_var, mean, var)
    backend = next((kernels for kernels in (native, cuda, triton_operations) if kernels.follows(*given)), reference)
    backend.follow(*given, momentum, unbias)


def accumulate(totals: Sequence[Tensor], more: Sequence[Tensor]) -> tuple[Sequence[Tensor], int | Tensor]:
    """The sums of float64 tensors of one device, pair by pair, or ``totals`` where some of ``more`` is not finite.

    They may be written to. The second result tells which: 1 or 0.
    """
    backend = native if native.accumulates(totals, more) else reference
    found: tuple[Sequence[Tensor], int | Tensor] = backend.accumulate(totals, more)
    return found


for _operation in OPERATIONS:
    ops.IMPLEMENTATIONS[_operation] = _serve(_operation)
    for _device in PROVIDERS:
        ops.library.impl(_operation, ops.IMPLEMENTATIONS[_operation], _device.upper())
