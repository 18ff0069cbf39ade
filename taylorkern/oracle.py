"""The oracle: the measured change of the loss when a unit goes, which every criterion tries to foretell."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .coupling import Coupling, couple
from .coupling.tracer import channel_dim
from .example import converted, run, tensors
from .state import untouched


def oracle(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    units: Sequence[int] | None = None,
    together: int = 16,
    progress: bool = False,
) -> Tensor:
    """ΔL of every minibatch and unit, [B, U] in float64: the loss with the unit's gate at 0 less that with all at 1.

    ``batches`` yields (inputs, targets), ``loss_fn`` takes the model's output and the targets. The model runs in the
    mode it is in, evaluation for a loss that does not depend on the rest of the batch; buffers and random state are put
    back, and each run draws the same random numbers. ``units`` picks some units, by index. In evaluation mode
    ``together`` units share a forward, the batch repeated for each; it needs an output of one tensor [N, ...].
    ``progress`` shows a bar on stderr.

    Raises ValueError where the coupling finds no unit or the output of ``together`` units can't be told apart.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    >>> x, target = torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    >>> oracle(model, x, nn.functional.cross_entropy, [(x, target)]).shape
    torch.Size([1, 4])
    """
    coupling = couple(model, example_inputs)
    if not coupling.units:
        raise ValueError(f"no unit of {type(model).__name__} can be removed:\n{coupling.report()}")
    chosen = torch.arange(len(coupling.units)) if units is None else torch.as_tensor(units)
    groups = chosen.split(1 if model.training else together)
    rows: list[Tensor] = []
    for inputs, targets in batches:
        with torch.no_grad():
            (whole,) = _losses(model, coupling, inputs, targets, loss_fn, torch.tensor([-1]))
            bar = tqdm(groups, desc=f"oracle, minibatch {len(rows) + 1}", unit="group", disable=not progress)
            found = [loss for group in bar for loss in _losses(model, coupling, inputs, targets, loss_fn, group)]
        rows.append(torch.stack(found) - whole)
    return torch.stack(rows) if rows else torch.zeros(0, len(chosen), dtype=torch.float64)


def _losses(
    model: nn.Module,
    coupling: Coupling,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    removed: Tensor,
) -> list[Tensor]:
    """The loss without each of the units ``removed`` [R] in turn, -1 for with all of them."""
    copies, samples = len(removed), next(tensors(inputs)).shape[0]
    gates = torch.ones(copies, len(coupling.units) + 1)
    gates[torch.arange(copies), removed] = 0
    gates[:, -1] = 1  # index -1: channels of no unit
    with untouched(model), _gated(model, coupling, gates.repeat_interleave(samples, 0)):
        output = run(model, converted(inputs, lambda t: _repeated(t, copies)))
    if copies == 1:
        return [loss_fn(output, targets).double()]
    if not isinstance(output, Tensor) or output.shape[0] != copies * samples:
        raise ValueError("together > 1 needs a model whose output is one tensor [N, ...]; pass together=1")
    return [loss_fn(part, targets).double() for part in output.split(samples)]


def _repeated(t: Tensor, copies: int) -> Tensor:
    return t.repeat(copies, *[1] * (t.dim() - 1)) if t.dim() else t


@contextmanager
def _gated(model: nn.Module, coupling: Coupling, gates: Tensor) -> Iterator[None]:
    """Within, every frontier layer's output is multiplied by ``gates`` [N, U + 1] of its channels' units."""

    def multiplying(units: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            dim = channel_dim(module, output)
            shape = [n if d in (0, dim) else 1 for d, n in enumerate(output.shape)]
            return output * gates[:, units].to(output).reshape(shape)

        return multiply

    handles = [
        model.get_submodule(layer).register_forward_hook(multiplying(units)) for layer, units in coupling.layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
