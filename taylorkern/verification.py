"""Compares a cut model with the dense one whose removed units are masked as their consumers see them.

Both run in evaluation mode on the example inputs, in float64 where the model runs in it. What is compared: every
output, and of every gateable layer the channels that stay. Equal up to rounding: the two add the same products, but
convolutions and matrix products of other sizes add them in another order. With gates, the dense one runs with them
multiplied at the layers' outputs, while the cut one has them in its weights, not yet rounded where it runs in float64.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .blame import stacklevel
from .channels import channel_dim
from .coupling import Coupling
from .emission import observed
from .example import converted, copied, in_float64, repeated, run, tensors
from .fit import changes
from .layers import gateable
from .state import named_tensors, untouched
from .widened import Widened

# Largest difference relative to the largest magnitude, per narrowest dtype that the model computes in. A sum of k
# products rounds by about √k·eps, and later layers pass that on: some 1e4 eps in deep networks. In float64 a wrong
# channel, off by a sizeable part of the whole, stands out at 1e-9 by far; narrower types leave less room.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class SurgeryError(RuntimeError):
    """A cut was refused and nothing changed. ``operation``, ``module`` and ``unit`` say where it failed, if known."""

    def __init__(self, message: str, operation: str = "", module: str = "", unit: int | None = None) -> None:
        super().__init__(message)
        self.operation, self.module, self.unit = operation, module, unit


@dataclass
class _Step:
    """A gateable layer's output in short, and the operations since the one before."""

    layer: str
    digest: Tensor  # [C]: a weighted sum over all positions, which tells positions apart
    scale: Tensor  # [C]: the sum of magnitudes
    positions: int
    operations: list[str]


@dataclass
class _Run:
    steps: list[_Step] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)  # since the last step
    outputs: list[Tensor] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)  # of what goes in, and narrower ones that occur on the way
    factors: dict[str, Tensor] = field(default_factory=dict)  # layer → [C], which its output is multiplied by
    module: str = ""
    pending: str = ""  # the operation that has begun and not ended


def check(
    model: nn.Module,
    coupling: Coupling,
    gone: Tensor,
    new: dict[str, Tensor],
    example_inputs: Any,
    gates: Tensor | None = None,
) -> None:
    """Raise SurgeryError unless ``model`` with the tensors ``new`` computes what it computes with ``gone`` masked.

    With ``gates`` [U] it is to compute what it computes with them at the outputs of the layers that produce the other
    units. ``new`` may be in float64, to be rounded to the model's dtypes where it runs in them. The model itself is
    left as it was, whatever happens. Its attention is understood (see ``taylorkern.attention``) by the caller.
    """
    named, factors = named_tensors(model), _factors(coupling, gone, gates)
    change: _Change = _in_float64
    try:
        dense, inputs = _observed_in_float64(model, _masked(named, coupling, gone, change), example_inputs, factors)
    except Exception as error:
        inputs, change = example_inputs, _in_its_own
        dense = _observe_own_dtype(model, _masked(named, coupling, gone, change), inputs, factors)
        warnings.warn(
            f"{type(model).__name__} does not run in float64 ({error}), so the cut is verified in its own precision "
            f"only: differences below {_tolerance(dense):.0e} of a layer's largest channel can't be seen",
            stacklevel=stacklevel(),
        )
    lost = _Lost(coupling, gone, gates is not None)
    values = {name: change(new.get(name, tensor), tensor.dtype) for name, tensor in named.items()}
    with _substituted(model, values, coupling.numbers(model, coupling.staying(gone))):
        thin = _Run(dtypes=dense.dtypes)
        try:
            _watch(model, inputs, thin)
        except Exception as error:
            raise lost.failed(thin, error) from error
        _compare(dense, thin, lost)
        if coupling.trained:
            _run_in_training(model, inputs, lost)


_Change = Callable[[Tensor, torch.dtype], Tensor]  # a tensor and the dtype it has in the model → the tensor to run with


def _lively(example_inputs: Any) -> Any:
    """The same example in float64, with noise for tensors that are all one number, which would hide differences."""
    generator = torch.Generator().manual_seed(0)

    def lively(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() < 2 or not bool((t == t.flatten()[0]).all()):
            return t
        return torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t)

    return converted(in_float64(example_inputs), lively)


def _in_float64(tensor: Tensor, own: torch.dtype) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else own)


def _in_its_own(tensor: Tensor, own: torch.dtype) -> Tensor:
    return tensor.detach().to(own)


def _factors(coupling: Coupling, gone: Tensor, gates: Tensor | None) -> dict[str, Tensor]:
    """Of every layer with a gate that is not 1, the gates of its channels [C]; 1 for the units ``gone``."""
    if gates is None:
        return {}
    z = torch.ones(len(coupling.units) + 1, dtype=torch.float64)
    stays = coupling.staying(gone)[:-1]
    z[:-1][stays] = gates.detach().to(z)[stays]
    found = {layer: z[units] for layer, units in coupling.layers.items()}
    return {layer: factors for layer, factors in found.items() if bool((factors != 1).any())}


def _masked(named: dict[str, Tensor], coupling: Coupling, gone: Tensor, change: _Change) -> dict[str, Tensor]:
    """Every tensor, changed, and nought in what the consumers multiply the units ``gone`` with."""
    masked = {name: change(tensor, tensor.dtype) for name, tensor in named.items()}
    stays = coupling.staying(gone)
    for name, dim in coupling.consumers:
        if masked[name].data_ptr() == named[name].data_ptr():
            masked[name] = masked[name].clone()
        indices = (~stays[coupling.axes[name, dim]]).nonzero().flatten()
        masked[name].index_fill_(dim, indices.to(masked[name].device), 0)
    return masked


def _observed_in_float64(
    model: nn.Module, values: dict[str, Tensor], example_inputs: Any, factors: dict[str, Tensor]
) -> tuple[_Run, Any]:
    """The dense run, and what it ran on."""
    inputs = _lively(example_inputs)
    with suppress(Exception):
        dense = _observe(model, values, inputs, factors)
        if all(step.scale.isfinite().all() for step in dense.steps):
            return dense, inputs
    inputs = in_float64(example_inputs)
    return _observe(model, values, inputs, factors), inputs


def _observe(model: nn.Module, values: dict[str, Tensor], inputs: Any, factors: dict[str, Tensor]) -> _Run:
    seen = _Run(dtypes=_floating((values, inputs)), factors=factors)
    with _substituted(model, values):
        _watch(model, inputs, seen)
    return seen


def _observe_own_dtype(model: nn.Module, values: dict[str, Tensor], inputs: Any, factors: dict[str, Tensor]) -> _Run:
    try:
        return _observe(model, values, inputs, factors)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} does not run on the example inputs: {error}") from error


@contextmanager
def _substituted(
    model: nn.Module, values: dict[str, Tensor], numbers: Iterable[tuple[nn.Module, str, int]] = ()
) -> Iterator[None]:
    """Within, the parameters and buffers hold ``values``, and the modules' attributes fit them and are ``numbers``."""
    named = named_tensors(model)
    held = {name: tensor.data for name, tensor in named.items()}
    attributes: list[tuple[nn.Module, str, Any]] = []
    try:
        for name, tensor in named.items():
            tensor.data = values[name].detach()
        for module, attribute, value in [*changes(model), *numbers]:
            attributes.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)
        yield
    finally:
        for name, tensor in named.items():
            tensor.data = held[name]
        for module, attribute, value in reversed(attributes):
            setattr(module, attribute, value)


def _watch(model: nn.Module, inputs: Any, seen: _Run) -> None:
    paths = {module: path for path, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(paths.get(module, ""))
        seen.module = stack[-1]

    def note(module: nn.Module, output: Tensor, dim: int) -> Tensor:
        if module not in paths or torch._C._are_functorch_transforms_active():  # whose tensors stay inside
            return output
        output = _multiplied(output, dim, seen.factors.get(paths[module]))
        seen.steps.append(_Step(paths[module], *_digest(output, dim), seen.operations))
        seen.operations = []
        return output

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if gateable(module) and isinstance(output, Tensor):
            output = note(module, output, channel_dim(module, output))
        stack.pop()
        seen.module = stack[-1] if stack else ""
        return output

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        wide = Widened() if torch.float64 in seen.dtypes else nullcontext()
        with untouched(model), torch.no_grad(), observed(note), wide, _Operations(seen):
            model.eval()
            seen.outputs = [t.clone() for t in tensors(run(model, copied(inputs)))]
    finally:
        for hook in hooks:
            hook.remove()


def _multiplied(output: Tensor, dim: int, factors: Tensor | None) -> Tensor:
    if factors is None:
        return output
    shape = [1] * output.dim()
    shape[dim] = len(factors)
    return output * factors.to(output).view(shape)


class _Operations(TorchDispatchMode):
    """Notes the operations, and the floating-point types that they narrow to."""

    def __init__(self, seen: _Run) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.pending = str(func)
        result = func(*args, **(kwargs or {}))
        self.seen.operations.append(f"{func} in {self.seen.module or 'the model'}")
        self.seen.pending = ""
        if not _floating(result) <= self.seen.dtypes:
            self.seen.dtypes |= _narrowed((args, kwargs), result)
        return result


def _narrowed(arguments: Any, result: Any) -> set[torch.dtype]:
    finest = min((torch.finfo(dtype).eps for dtype in _floating(arguments)), default=torch.inf)
    return {dtype for dtype in _floating(result) if torch.finfo(dtype).eps > finest}


def _floating(value: Any) -> set[torch.dtype]:
    return {t.dtype for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()}


def _digest(output: Tensor, dim: int) -> tuple[Tensor, Tensor, int]:
    rows = output.movedim(dim, 0).double()
    rows = rows.reshape(len(rows), -1)  # [C, positions]
    positions = rows.shape[1]
    weights = torch.arange(positions, dtype=rows.dtype, device=rows.device).cos()
    return rows @ weights, rows.abs().sum(1), positions


def _compare(dense: _Run, thin: _Run, lost: "_Lost") -> None:
    tolerance = _tolerance(dense)
    _check_finite(dense)
    before = "the inputs"
    for a, b in zip(dense.steps, thin.steps, strict=False):
        if not _agree(a, b, lost.stays(a.layer), tolerance):
            raise lost.differs(a.layer, before, b.operations)
        before = a.layer
    if len(dense.steps) != len(thin.steps) or len(dense.outputs) != len(thin.outputs):
        raise lost.differs("the number of layers and outputs", before, thin.operations)
    for i, (x, y) in enumerate(zip(dense.outputs, thin.outputs, strict=True)):
        if x.shape != y.shape or not _close(x, y, x.abs().max() if x.numel() else x.sum(), tolerance):
            raise lost.differs(f"output {i}", before, thin.operations)


def _tolerance(seen: _Run) -> float:
    return max((_TOLERANCE.get(dtype, 1e-1) for dtype in seen.dtypes), default=0.0)


def _check_finite(dense: _Run) -> None:
    """Networks whose numbers have overflowed can't be compared: say so instead of blaming the cut."""
    lost = [step.layer for step in dense.steps if not step.scale.isfinite().all()]
    if lost or not all(output.isfinite().all() for output in dense.outputs):
        where, gated = lost[0] if lost else "the outputs", ", with these gates," if dense.factors else ""
        raise SurgeryError(
            f"refused: before any cut{gated} the network computes non-finite numbers at {where} on the example inputs, "
            "so nothing can be compared; have its weights diverged, or are the example inputs not finite?",
            module=where,
        )


def _agree(a: _Step, b: _Step, stays: Tensor | None, tolerance: float) -> bool:
    if a.layer == b.layer and a.positions != b.positions:
        return True  # channels lie along its positions, as in layers that mix tokens: what comes behind it tells
    digest, scale = (a.digest, a.scale) if stays is None else (a.digest[stays], a.scale[stays])
    return a.layer == b.layer and digest.shape == b.digest.shape and _close(digest, b.digest, scale.max(), tolerance)


def _close(x: Tensor, y: Tensor, scale: Tensor, tolerance: float) -> bool:
    # Written so that a NaN anywhere is a difference.
    return bool(((x.double() - y.double()).abs() <= tolerance * scale.double()).all())


@dataclass(frozen=True)
class _Lost:
    """The units that went, and how to say that it did not work."""

    coupling: Coupling
    gone: Tensor
    gated: bool

    def stays(self, layer: str) -> Tensor | None:
        units = self.coupling.outputs.get(layer)
        return None if units is None else self.coupling.staying(self.gone)[units]

    def differs(self, what: str, before: str, operations: list[str]) -> SurgeryError:
        unit = self._unit(what)
        dense = "dense one with these gates" if self.gated else "masked dense one"
        return SurgeryError(
            f"refused: {self._changed(unit)}, the network would differ from the {dense} at {what}; operations since "
            f"{before}: {', '.join(operations) or 'none'}",
            operations[0].split(" in ")[0] if operations else "",
            what,
            unit,
        )

    def failed(self, seen: _Run, error: Exception) -> SurgeryError:
        last = seen.steps[-1].layer if seen.steps else ""
        unit = self._unit(last)
        what = f"{seen.pending or 'the code'} in {f'module {seen.module!r}' if seen.module else 'the model itself'}"
        return SurgeryError(
            f"refused: {self._changed(unit)}, {what} fails: {error}; operations since {last or 'the inputs'}: "
            f"{', '.join(seen.operations) or 'none'}. If a width is a fixed number there, take it from the tensor's "
            "shape instead",
            seen.pending,
            seen.module,
            unit,
        )

    def _unit(self, layer: str) -> int | None:
        """A removed unit of this layer, or the first one removed."""
        units = self.coupling.outputs.get(layer)
        here = self.gone[torch.isin(self.gone, units)] if units is not None else self.gone
        return next(iter((*here.tolist(), *self.gone.tolist())), None)

    def _changed(self, unit: int | None) -> str:
        changes = ["with the gates folded into the weights"] if self.gated else []
        if unit is not None:
            layer, channel = self.coupling.units[unit].places[0]
            changes.insert(0, f"without unit {unit} ({layer}, channel {channel}) and {len(self.gone) - 1} more")
        return " and ".join(changes)


def _run_in_training(model: nn.Module, inputs: Any, lost: _Lost) -> None:
    """Branches that exist only in training must run; their numbers depend on chance and are not compared."""
    errors = []
    for example in (inputs, repeated(inputs)):
        seen = _Run()
        try:
            with untouched(model), torch.no_grad(), _Operations(seen):
                model.train()
                run(model, copied(example))
            return
        except Exception as error:
            errors.append((seen, error))
    raise lost.failed(*errors[-1]) from errors[-1][1]
