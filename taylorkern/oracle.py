"""The oracle: the measured change of the loss when a unit goes, which every criterion tries to foretell."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .channels import channel_dim
from .coupling import Coupling, couple
from .example import converted, run, tensors
from .measurements import Measurements, Row
from .state import untouched

WHOLE = -1  # in place of a unit: none is removed
NOISE = 32  # roundings that a network may be off in its outputs, relative to the largest
# What torch.backends may compute float32 in on a device, and how that rounds.
_FLOAT32 = {"cuda": ("cudnn.conv", "cuda.matmul"), "cpu": ("mkldnn.conv", "mkldnn.matmul")}
_COARSER = {"tf32": 2.0**-10, "bf16": 2.0**-7}


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
    each; it needs layers and an output of [N, ...]. In every minibatch the whole network and the unit of the largest
    change are compared with what each gives alone. ``progress`` shows a bar on stderr. A loss is as exact as the model
    computes it: in float32, changes below some 1e-7 of it are noise.

    With ``file`` the measurements are kept there, written at the end of each minibatch, every half minute within one
    and when the call is interrupted. Called again with the same model, units, minibatches and ``together`` it goes on
    where it stopped, and returns what a call without interruption does, bit for bit.

    Raises ValueError where the coupling finds no unit, ``units`` holds none of its indices, the output of ``together``
    units can't be told apart or is not what each gives alone, the loss is not one number, or ``file`` is damaged or
    holds measurements of another model, other units, minibatches or another loss (it is not touched then), or can't
    tell minibatches apart for objects in them that can't be hashed.

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
    changes = []
    with torch.no_grad(), kept, _bar(kept, len(chosen), count, progress) as bar:
        for b, (inputs, targets) in enumerate(batches):
            row = kept.row(b, (inputs, targets))
            bar.set_postfix_str(f"minibatch {b + 1}")
            minibatch = Minibatch(model, coupling, inputs, targets, loss_fn, seed=b)
            if b == 0 and row.measured[0]:
                kept.check_loss(float(minibatch.losses(columns[:1])), _precision(model))
            for group, losses in _measured(minibatch, columns, row, share):
                kept.add(row, group, losses)
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
            return torch.stack([self._loss(output) for output in self._outputs(removed)])

    def losses_beside(self, removed: Tensor, whole: Tensor) -> Tensor:
        """:meth:`losses`; raises ValueError unless the whole network's loss is ``whole`` behind these copies too."""
        with untouched(self.model):
            *outputs, last = self._outputs(torch.cat([removed, torch.tensor([WHOLE])]))
            losses = torch.stack([self._loss(output) for output in outputs])
            together, tolerance = self._rounded(last)
            _compare("the whole network's loss", together, whole, tolerance)
        return losses

    def check_alone(self, removed: Tensor, losses: Tensor, whole: Tensor) -> bool:
        """Raise ValueError unless the unit whose ``losses`` [R] are farthest from ``whole`` has the same loss alone.

        Returns whether it is farther than noise: otherwise the check tells nothing of how samples act on one another.
        """
        changes = (losses - whole).abs().nan_to_num(-1, -1)  # of finite ones
        largest = int(changes.argmax())
        with untouched(self.model):
            (output,) = self._outputs(removed[largest : largest + 1])
            alone, tolerance = self._rounded(output)
        _compare(f"the loss without unit {int(removed[largest])}", losses[largest], alone, tolerance)
        return bool(changes[largest] > tolerance)

    def _rounded(self, output: Tensor) -> tuple[Tensor, float]:
        """The loss of ``output``, and how far rounding may move it: a little of it, and what a noisy output does."""
        eps, loss = _precision(self.model), self._loss(output.clone())  # a loss_fn may write into it
        noisy = [loss]
        if output.is_floating_point():
            eps = max(eps, torch.finfo(output.dtype).eps)
            scale = NOISE * eps * output.abs().max()
            noisy = [self._loss(output + scale * torch.randn_like(output)) for _ in range(3)]
        tolerance = eps**0.7 * loss.abs() + (torch.stack(noisy) - loss).abs().max()
        return loss, float(tolerance.nan_to_num(0, 0))

    def _outputs(self, removed: Tensor) -> Sequence[Any]:
        """The model's output without each of the units ``removed`` [R] in turn; run within ``untouched``."""
        _seed(self.model, self.seed)
        if len(removed) == 1:
            return [self._output(removed)]
        output = self._together(removed)
        if not isinstance(output, Tensor) or not output.dim() or output.shape[0] != len(removed) * self.samples:
            raise ValueError("together > 1 needs a model whose output is one tensor [N, ...]; pass together=1")
        return output.split(self.samples)

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

        def repeated(t: Tensor) -> Tensor:
            batched = t.dim() and t.shape[0] == samples
            return t.repeat(copies, *[1] * (t.dim() - 1)) if batched else t.clone()

        with _gated(self.model, self.coupling, removed, samples):
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


def _compare(what: str, together: Tensor, alone: Tensor, tolerance: float) -> None:
    if not torch.isclose(together, alone, rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"with several units a forward {what} is {float(together):.9g}, alone it is {float(alone):.9g}: "
            "the samples of a batch act on one another, the model draws random numbers, or not every input is "
            "[N, ...]; pass together=1"
        )


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


def _measured(minibatch: Minibatch, columns: Tensor, row: Row, share: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each group of columns of ``row`` that was missing, and its losses; the row's first group has the whole beside."""
    checked = False
    for group in _groups(row, share):
        removed, several = columns[group], len(group) > 1
        # Always the same group, not this call's first: a forward of other copies could round otherwise.
        if several and int(group[0]) == 1:
            losses = minibatch.losses_beside(removed, row.losses[0])
        else:
            losses = minibatch.losses(removed)
        if several and not checked:
            checked = minibatch.check_alone(removed, losses, row.losses[0])
        yield group, losses


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


def _precision(model: nn.Module) -> float:
    """The relative rounding of what ``model`` computes: its coarsest dtype's, or coarser where torch is told so."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    device = parameters[0].device.type if parameters else "cpu"
    dtypes = {p.dtype for p in parameters} or {torch.float32}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    found = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.float32 in dtypes:
        settings = [attrgetter(f"{name}.fp32_precision")(torch.backends) for name in _FLOAT32.get(device, ())]
        found += [_COARSER.get(setting, 0.0) for setting in settings]
    return max(found)


@contextmanager
def _gated(model: nn.Module, coupling: Coupling, removed: Tensor, samples: int) -> Iterator[None]:
    """Within, the channels of unit ``removed[r]`` are nought in the r-th copy of ``samples`` samples, in every layer.

    Layers that hold none of these units run untouched: they would only be multiplied by ones. With one copy a layer's
    first dimension may be anything.
    """
    copies = len(removed)
    gates = torch.ones(copies, len(coupling.units) + 1)
    gates[torch.arange(copies), removed] = 0
    gates[:, -1] = 1  # index -1: channels of no unit, and no unit

    def multiplying(layer: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            rows, dim = copies * samples if copies > 1 else 1, channel_dim(module, output)
            if rows > 1 and (dim == 0 or output.shape[0] != rows):
                raise ValueError(
                    f"{layer} gives {list(output.shape)} for {rows} samples: its first dimension is not the batch's; "
                    "pass together=1"
                )
            shape = [n if d == dim else rows if d == 0 else 1 for d, n in enumerate(output.shape)]
            factors = gates[:, coupling.layers[layer]].repeat_interleave(rows // copies, 0)
            return output * factors.to(output).reshape(shape)

        return multiply

    gone = (coupling.units[unit] for unit in removed.tolist() if unit != WHOLE)
    layers = dict.fromkeys(layer for unit in gone for layer, _ in unit.places)
    handles = [model.get_submodule(layer).register_forward_hook(multiplying(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
