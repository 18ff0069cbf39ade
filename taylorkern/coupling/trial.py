"""Tries a cut without making it: runs the model with smaller tensors and compares every operation's sizes.

Labels say what a cut leaves of every tensor. Code that bakes a width into a number makes something else of it, or
fails: the first operation that does is found here. Tensors are on the meta device, which has shapes and no data. What
goes wrong there is tried again on real ones: some models don't run on that device, some operations run as others.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..emission import observed
from ..example import converted, copied, run
from ..fit import changes
from ..state import named_tensors, untouched
from .labels import Place
from .modules import Running
from .script import Step
from .source import line
from .units import Coupling

# Which of these run depends on strides and on sizes of 1: they are not compared, what is computed with them is.
_LAYOUT = frozenset(
    "view _unsafe_view _reshape_alias clone expand t transpose permute squeeze unsqueeze as_strided detach alias "
    "_to_copy copy_".split()
)


@dataclass(frozen=True)
class Failure:
    """The first operation that did not make of a cut what its labels say, and the labels to blame, likeliest first."""

    place: Place
    steps: list[Step]  # what ran up to there, the failing one last
    suspects: list[Tensor]
    by_code: bool = False  # whether code between two operations failed, the first of which is named


@dataclass
class _DeviationError(Exception):
    failure: Failure


@dataclass(frozen=True)
class Scene:
    """A run of the dense model: in which mode, on what, and what it did."""

    training: bool
    example_inputs: Any
    script: list[Step]


def attempt(model: nn.Module, scene: Scene, coupling: Coupling, unit: Tensor) -> Failure | None:
    """Run ``model`` as a cut would leave it; None where every operation gives what is expected.

    ``unit`` [labels + 1] is each label's unit.
    """
    removed = _some(coupling)
    stays = coupling.staying(removed)[unit]
    for device in ("meta", None):
        watch = _Watch(model, scene.script, stays)
        try:
            with _cut_down(model, coupling, coupling.staying(removed), device):
                inputs = _on(scene.example_inputs, device)
                with untouched(model), torch.no_grad(), watch.running.followed(), observed(_nothing), watch:
                    model.train(scene.training)
                    run(model, inputs)
            if device is None or watch.met_all():
                return None
            continue  # fused operations run as others there
        except _DeviationError as deviation:
            failure: Failure | None = deviation.failure
        except Exception:
            failure = watch.stopped()
        if device is None:
            return failure
    raise AssertionError("the last device returns")


def _nothing(module: nn.Module, output: Tensor, dim: int) -> None:
    """Observed as in the trace, attention runs the same code."""


def _on(example_inputs: Any, device: str | None) -> Any:
    return converted(example_inputs, lambda t: t.to(device)) if device else copied(example_inputs)


def _some(coupling: Coupling) -> Tensor:
    """About 30 % of the units at random, always the same ones, and something of every dimension that can spare it."""
    count = len(coupling.units)
    generator = torch.Generator().manual_seed(0)
    gone = torch.zeros(count + 1, dtype=torch.bool)
    gone[torch.randperm(count, generator=generator)[: int(0.3 * count)]] = True
    vectors = {units.numpy().tobytes(): units for units in coupling.axes.values()}.values()
    for units in vectors:
        some = units[units >= 0].unique()
        if len(some) > 1 and not bool(gone[some].any()):
            gone[some[len(some) // 2]] = True
    for units in vectors:
        if bool(gone[units].all()):
            gone[units[0]] = False
    return gone[:-1].nonzero().flatten()


@contextlib.contextmanager
def _cut_down(model: nn.Module, coupling: Coupling, stays: Tensor, device: str | None) -> Iterator[None]:
    """Within, other tensors stand in for the model's, as small as a cut leaves them, and its attributes fit them."""
    named = named_tensors(model)
    small = {id(tensor): _small(name, tensor, coupling, stays, device) for name, tensor in named.items()}
    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (holder, name, tensor)
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    ]
    attributes: list[tuple[nn.Module, str, Any]] = []
    try:
        for holder, name, tensor in held:
            holder[name] = small[id(tensor)]
        for module, attribute, value in [*changes(model), *coupling.numbers(model, stays)]:
            attributes.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)
        yield
    finally:
        for holder, name, tensor in held:
            holder[name] = tensor
        for module, attribute, value in reversed(attributes):
            setattr(module, attribute, value)


def _small(name: str, tensor: Tensor, coupling: Coupling, stays: Tensor, device: str | None) -> Tensor:
    new = tensor.detach().to(device) if device else tensor.detach()
    for dim in range(tensor.dim()):
        units = coupling.axes.get((name, dim))
        if units is not None and not bool(stays[units].all()):
            new = new.index_select(dim, stays[units].nonzero().flatten().to(new.device))
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@dataclass
class _Seen:
    turns: Counter[Place] = field(default_factory=Counter)
    last: int = -1  # the step of the script that was the last to come out right
    pending: int | None = None  # the one that has begun


class _Watch(TorchDispatchMode):
    """Compares each operation with the one in the script that has its place and turn."""

    def __init__(self, model: nn.Module, script: list[Step], stays: Tensor) -> None:
        super().__init__()
        self.running = Running(model)
        self._script, self._stays, self._seen = script, stays, _Seen()
        self._numbers = {(step.place, step.turn): number for number, step in enumerate(script)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = Place(str(func), self.running.path, line())
        self._seen.turns[place] += 1
        self._seen.pending = self._numbers.get((place, self._seen.turns[place]))
        result = func(*args, **(kwargs or {}))
        if self._seen.pending is not None:
            if func._schema.name.removeprefix("aten::") not in _LAYOUT:
                self._compare(self._seen.pending, func, args, kwargs or {}, result)
            self._seen.last, self._seen.pending = self._seen.pending, None
        return result

    def _compare(self, number: int, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        step = self._script[number]
        got = [tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)]
        expected = step.expected(self._stays)
        # What an operation keeps for its backward carries no labels.
        right = all(a == b or not lines for a, b, lines in zip(got, expected, step.lines, strict=True))
        if not right or not self._counts(step, func, args, kwargs):
            raise _DeviationError(self._failure(number, step.suspects(got, expected)))

    def _counts(self, step: Step, func: Any, args: Any, kwargs: Any) -> bool:
        names = [a.name for a in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return all(given[name] == int(self._stays[labels].sum()) for name, labels in step.counts.items())

    def met_all(self) -> bool:
        """Whether every operation of the script has been compared, those apart that only change the layout."""
        return all(
            self._seen.turns[step.place] >= step.turn
            for step in self._script
            if step.place.operation.split(".")[1] not in _LAYOUT
        )

    def stopped(self) -> Failure | None:
        """The operation that failed, or where code between operations did, the one before; None where nothing ran."""
        between = self._seen.pending is None
        number = self._seen.last if self._seen.pending is None else self._seen.pending
        return None if number < 0 else self._failure(number, self._script[number].suspects(None, []), between)

    def _failure(self, number: int, suspects: list[Tensor], by_code: bool = False) -> Failure:
        return Failure(self._script[number].place, self._script[: number + 1], suspects, by_code)
