"""Cuts units out of a model, its copies and its optimisers: all or nothing, checked against the masked dense model."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import understood
from .compensation import folded, rounded
from .copies import counterparts
from .coupling import Coupling
from .edits import Edit, perform, replacing
from .fit import changes, fit_attributes
from .masks import follow_cut, masked_units
from .moments import cut_moments
from .slices import Indices, sliced
from .state import named_tensors, stand_in
from .verification import SurgeryError, check

__all__ = ["Bodies", "SurgeryError", "cut", "fit_attributes"]


@torch.inference_mode(False)  # whose tensors could not be trained
def cut(
    model: nn.Module,
    coupling: Coupling,
    removed: Tensor | Sequence[int],
    example_inputs: Any,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    verify: bool = True,
    gates: Tensor | None = None,
    copies: nn.Module | Iterable[nn.Module] | None = None,
) -> Coupling:
    """Remove the units ``removed`` (indices into ``coupling.units``) from ``model``, in place.

    Parameters and buffers keep their identity, ``requires_grad``, dtype, device and memory format; gradients and the
    state of ``optimizers`` are cut alike; module attributes follow. With ``verify`` the cut model is first compared
    with the dense one in which the consumers' weights for the removed units are zero (see
    ``taylorkern.verification``). Returns the coupling of the cut model, ready for the next cut.

    ``copies`` (one or several; averages of the weights, as ``torch.optim.swa_utils.AveragedModel`` keeps them, wrapped
    or not) lose the same channels of their own parameters and buffers, identities kept.

    State of an optimiser is cut where it has the parameter's shape, in whatever dtype and layout; single numbers stay.
    An optimiser that moves every element by its own gradient and state (torch's SGD, Adagrad, Adadelta, Adam and its
    kin, ASGD, RMSprop, Rprop) goes on exactly as in the masked dense network; one that looks at whole matrices (Muon)
    goes on with those that are left. LBFGS that has stepped, and state of other shapes (Adafactor's), are refused.

    ``gates`` z [U] are folded in with the same stroke, also where nothing is removed: at every place of a kept unit u
    the layer's weight and bias are multiplied by z[u], in float64 and rounded once, so the cut model computes what the
    dense one does with these gates at its layers' outputs (see ``taylorkern.compensation``); in ``copies`` as well.
    Entries of removed units are ignored. Gradients and the state of ``optimizers`` are cut as ever and not rescaled:
    they stem from the weights before. Verified are the weights before they are rounded.

    Units that are masked (``taylorkern.masking``) and stay are masked afterwards, too.

    Raises ValueError where the request is wrong or a copy is none, and SurgeryError where the cut model would fail or
    compute something else, or an optimiser can't go on; nothing has changed then.

    >>> from taylorkern.coupling import couple
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> x = torch.rand(1, 1, 4, 4)
    >>> coupling = cut(model, couple(model, x), [0, 2], x)
    >>> len(coupling.units), tuple(model[3].weight.shape)
    (2, (2, 8))
    """
    gone = indices(removed, coupling)
    masked_units(model, coupling)  # or ValueError
    if not len(gone) and gates is None:
        return coupling
    bodies = Bodies.of(model, copies, coupling, gone, gates)
    edits = bodies.cutting()
    edits += cut_moments(optimizers, bodies.of_model(bodies.plan), bodies.names) if bodies.plan else []
    with ExitStack() as stack:
        for body in bodies.bodies:
            stack.enter_context(understood(body.module))
        if verify and bodies.concerned:
            bodies.check(example_inputs, gates)
        perform(edits, bodies.attributes)
    if not len(gone):
        return coupling
    kept = coupling.staying(gone)[:-1].nonzero().flatten()
    after = coupling.keep(kept)
    follow_cut(model, after, kept)
    return after


@dataclass(frozen=True)
class _Body:
    """A model or a copy of it, and what gates make of its parameters: by name, whole and in float64."""

    module: nn.Module
    named: dict[str, Tensor]
    scaled: dict[str, Tensor]


@dataclass(frozen=True)
class Bodies:
    """A model and its copies, about to lose the units ``gone``: ``plan`` has what stays of which tensor."""

    coupling: Coupling
    gone: Tensor
    plan: dict[str, Indices]
    bodies: list[_Body]  # the model first

    @classmethod
    def of(
        cls,
        model: nn.Module,
        copies: nn.Module | Iterable[nn.Module] | None,
        coupling: Coupling,
        gone: Tensor,
        gates: Tensor | None,
    ) -> "Bodies":
        """Raises ValueError where the coupling or a copy is another model's, or a width would be nought."""
        plan = _plan(named_tensors(model), coupling, coupling.staying(gone))
        modules = [model, *counterparts(model, copies)]
        scaled = [{} if gates is None else folded(module, coupling, gone, gates) for module in modules]
        return cls(coupling, gone, plan, [_Body(m, named_tensors(m), s) for m, s in zip(modules, scaled, strict=True)])

    @property
    def concerned(self) -> bool:
        """Whether anything of the model changes."""
        return bool(self.plan or self.bodies[0].scaled)

    @property
    def names(self) -> dict[Tensor, str]:
        return {tensor: name for name, tensor in self.bodies[0].named.items()}

    def of_model(self, by_name: dict[str, Indices]) -> dict[Tensor, Indices]:
        """The same, by the model's own tensors."""
        return {self.bodies[0].named[name]: entry for name, entry in by_name.items()}

    def cutting(self) -> list[Edit]:
        """The edits by which all lose the units, gates folded in. Raises ValueError where a weight would overflow."""
        return [
            replacing(body.named[name], _new(name, body.named[name], body.scaled.get(name), keep), keep)
            for body in self.bodies
            for name, keep in {name: self.plan.get(name, {}) for name in (*self.plan, *body.scaled)}.items()
        ]

    def attributes(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """The attributes that do not fit the tensors as they are now, with the values that would."""
        stays = self.coupling.staying(self.gone)
        for body in self.bodies:
            yield from changes(body.module)
            yield from self.coupling.numbers(body.module, stays)

    def check(self, example_inputs: Any, gates: Tensor | None, apart: bool = False) -> None:
        """Raise SurgeryError unless the model computes without the units what it does with them masked.

        With ``apart`` the model's own tensors hold their data all the while, where it can be copied.
        """
        model = self.bodies[0]
        module = stand_in(model.module) if apart else model.module
        exact = {
            name: sliced(model.scaled.get(name, model.named[name]), self.plan.get(name, {}))
            for name in (*self.plan, *model.scaled)
        }
        with understood(module):
            check(module, self.coupling, self.gone, exact, example_inputs, gates)


def indices(removed: Tensor | Sequence[int], coupling: Coupling) -> Tensor:
    """``removed`` as ascending int64 indices of units. Raises ValueError where they are no such thing."""
    gone = torch.as_tensor(removed).cpu()
    if gone.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if gone.dim() != 1 or gone.is_floating_point() or gone.dtype == torch.bool:
        raise ValueError(
            f"removed must be unit indices, a 1-D sequence of integers; got {gone.dtype} {tuple(gone.shape)}"
        )
    gone = gone.to(torch.int64)
    count = len(coupling.units)
    if int(gone.min()) < 0 or int(gone.max()) >= count:
        raise ValueError(f"removed holds {int(gone.min())}..{int(gone.max())}, but the units are 0..{count - 1}")
    if len(gone.unique()) < len(gone):
        raise ValueError("removed holds a unit twice")
    return gone.sort().values


def _plan(named: dict[str, Tensor], coupling: Coupling, stays: Tensor) -> dict[str, Indices]:
    """What stays of every dimension that loses something."""
    plan: dict[str, dict[int, Tensor]] = {}
    for (name, dim), units in coupling.axes.items():
        if name not in named or named[name].dim() <= dim or named[name].shape[dim] != len(units):
            found = tuple(named[name].shape) if name in named else "nothing"
            raise ValueError(
                f"the coupling is not this model's: {name} dim {dim} should have size {len(units)}, but has {found}"
            )
        keep = stays[units].nonzero().flatten()
        if not len(keep):
            raise ValueError(
                f"removing these units would leave nothing of {name} dim {dim}; keep one of its {len(units)} channels"
            )
        if len(keep) < len(units):
            plan.setdefault(name, {})[dim] = keep
    return dict(plan)


def _new(name: str, tensor: Tensor, scaled: Tensor | None, keep: Indices) -> Tensor:
    """What ``tensor`` will hold: rounded from ``scaled`` where there is one, then cut."""
    return sliced(tensor if scaled is None else rounded(name, tensor, scaled), keep)
