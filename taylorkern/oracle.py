"""The oracle: the measured change of the loss when a unit goes, which every criterion tries to foretell."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .coupling import Coupling, couple
from .coupling.tracer import channel_dim
from .example import converted, run, tensors
from .measurements import Measurements, Row
from .state import untouched

WHOLE = -1  # in place of a unit: none is removed


def oracle(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    units: Sequence[int] | Tensor | None = None,
    together: int = 16,
    progress: bool = False,
    file: str | Path | None = None,
) -> Tensor:
    """ΔL of every minibatch and unit, [B, U] in float64: the loss with the unit's gate at 0 less that with all at 1.

    ``batches`` yields (inputs, targets), ``loss_fn`` takes the model's output and the targets and returns one number.
    The model runs in the mode it is in, evaluation for a loss that does not depend on the rest of the batch; buffers
    and random state are put back, and every run of a minibatch draws the same random numbers. ``units`` picks some
    units, by index. Where samples don't act on one another ``together`` units share a forward, the batch repeated for
    each; it needs an output of one tensor [N, ...]. ``progress`` shows a bar on stderr. A loss is as exact as the
    model's dtype: in float32, changes below some 1e-7 of it are noise.

    With ``file`` the measurements are kept there, written at the end of each minibatch, every half minute within one
    and when the call is interrupted. Called again with the same model, units, minibatches and ``together`` it goes on
    where it stopped, and returns what a call without interruption does, bit for bit.

    Raises ValueError where the coupling finds no unit, ``units`` holds none of its indices, the output of ``together``
    units can't be told apart or is not what each gives alone, the loss is not one number, or ``file`` is damaged or
    holds measurements of another model, other units, minibatches or another loss: it is not touched then.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    >>> x, target = torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    >>> oracle(model, x, nn.functional.cross_entropy, [(x, target)]).shape
    torch.Size([1, 4])
    """
    coupling = couple(model, example_inputs)
    if not coupling.units:
        raise ValueError(f"no unit of {type(model).__name__} can be removed:\n{coupling.report()}")
    if together < 1:
        raise ValueError(f"together={together} must be at least 1")
    chosen = _chosen(units, len(coupling.units))
    share = 1 if _samples_meet(model) else together
    kept = Measurements.of(model, coupling, chosen, Path(file) if file is not None else None)
    columns = torch.cat([torch.tensor([WHOLE]), chosen])
    count = _length(batches)
    checked = share == 1
    changes = []
    with torch.no_grad(), kept, _bar(kept, len(chosen), count, progress) as bar:
        for b, (inputs, targets) in enumerate(batches):
            row = kept.row(b, (inputs, targets))
            bar.set_postfix_str(f"minibatch {b + 1}")
            minibatch = Minibatch(model, coupling, inputs, targets, loss_fn, seed=b)
            if b == 0 and row.measured[0]:
                kept.check_loss(float(minibatch.losses(columns[:1])))
            for group in _groups(row, share):
                if not checked and len(group) > 1:
                    minibatch.check_together(columns[group], row.losses[0])
                    checked = True
                kept.add(row, group, minibatch.losses(columns[group]))
                bar.update(int((group > 0).sum()))
            changes.append(row.changes)
    return torch.stack(changes) if changes else torch.zeros(0, len(chosen), dtype=torch.float64)


@dataclass(frozen=True)
class Minibatch:
    """Samples to measure on, and how."""

    model: nn.Module
    coupling: Coupling
    inputs: Any
    targets: Any
    loss_fn: Callable[[Any, Any], Tensor]
    seed: int  # of the random numbers that every run of this minibatch draws

    @property
    def samples(self) -> int:
        """N, the first dimension of the first tensor that has one."""
        found = next((t.shape[0] for t in tensors(self.inputs) if t.dim()), None)
        if found is None:
            raise ValueError("the inputs of a minibatch hold no tensor [N, ...]; batches yield (inputs, targets)")
        return found

    def losses(self, removed: Tensor) -> Tensor:
        """The loss without each of the units ``removed`` [R] in turn, :data:`WHOLE` for with all; [R] in float64."""
        with untouched(self.model):
            _seed(self.model, self.seed)
            if len(removed) == 1:
                return self._loss(self._output(removed)).reshape(1)
            output = self._together(removed)
            if not isinstance(output, Tensor) or not output.dim() or output.shape[0] != len(removed) * self.samples:
                raise ValueError("together > 1 needs a model whose output is one tensor [N, ...]; pass together=1")
            return torch.stack([self._loss(part) for part in output.split(self.samples)])

    def check_together(self, removed: Tensor, whole: Tensor) -> None:
        """Raise ValueError unless the whole network's loss is ``whole`` beside copies without the units ``removed``."""
        beside = self.losses(torch.cat([torch.tensor([WHOLE]), removed]))[0]
        tolerance = torch.finfo(_dtype(self.model)).eps ** 0.4  # float32: 0.002
        if whole.isfinite() and not abs(beside - whole) <= tolerance * max(1.0, abs(float(whole))):
            raise ValueError(
                f"with several units a forward the whole network's loss is {float(beside):.6g}, alone it is "
                f"{float(whole):.6g}: the samples of a batch act on one another, or not every input is [N, ...]; "
                "pass together=1"
            )

    def _together(self, removed: Tensor) -> Any:
        try:
            return self._output(removed)
        except RuntimeError as error:
            raise ValueError(
                f"the model fails on {len(removed)} x {self.samples} samples at once, for want of memory or for an "
                f"input that is not [N, ...]: pass a smaller together=, at last 1 ({error})"
            ) from error

    def _output(self, removed: Tensor) -> Any:
        copies, samples = len(removed), self.samples
        gates = torch.ones(copies, len(self.coupling.units) + 1)
        gates[torch.arange(copies), removed] = 0
        gates[:, -1] = 1  # index -1: channels of no unit, and no unit

        def repeated(t: Tensor) -> Tensor:
            batched = t.dim() and t.shape[0] == samples
            return t.repeat(copies, *[1] * (t.dim() - 1)) if batched else t.clone()

        with _gated(self.model, self.coupling, gates.repeat_interleave(samples, 0)):
            return run(self.model, converted(self.inputs, repeated))

    def _loss(self, output: Any) -> Tensor:
        loss = self.loss_fn(output, self.targets)
        loss = loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn returned {tuple(loss.shape)}, not one number: take the mean over the samples "
                "(reduction='mean')"
            )
        return loss.cpu().double().reshape(())


def _seed(model: nn.Module, seed: int) -> None:
    """Seed the generators that ``untouched`` puts back, and no other device's."""
    torch.default_generator.manual_seed(seed)
    for device in {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}:
        torch.cuda.default_generators[device or 0].manual_seed(seed)


def _chosen(units: Sequence[int] | Tensor | None, count: int) -> Tensor:
    if units is None:
        return torch.arange(count)
    chosen = torch.as_tensor(units).cpu()
    if chosen.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    indices = chosen.dim() == 1 and not chosen.is_floating_point() and chosen.dtype != torch.bool
    if not indices or int(chosen.min()) < 0 or int(chosen.max()) >= count:
        raise ValueError(f"units must be a list of indices from 0 to {count - 1}, not {units!r}")
    return chosen.long()


def _samples_meet(model: nn.Module) -> bool:
    """Whether some module says that a sample's output depends on the others of its batch, or on its place in it."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(module.training for module in model.modules()) or any(norm.running_mean is None for norm in norms)


def _groups(row: Row, share: int) -> list[Tensor]:
    """The columns of ``row`` that are not measured, column 0 by itself and ``share`` of the others at a time."""
    missing = (~row.measured).nonzero().flatten()
    groups = (*missing[missing == 0].split(1), *missing[missing > 0].split(share))
    return [group for group in groups if len(group)]


def _bar(kept: Measurements, units: int, minibatches: int | None, shown: bool) -> tqdm:
    total = None if minibatches is None else units * minibatches
    return tqdm(desc="oracle", unit="unit", total=total, initial=kept.known(minibatches), disable=not shown)


def _length(batches: Iterable) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of a dataset without a length
        return None


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


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
