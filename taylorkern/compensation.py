"""Compensation: the gates of kept units, multiplied into the layers whose outputs they stand at.

A gate z behind γ·x̂ + β, or behind a filter's w·x + b, is the same layer with zγ and zβ, or zw and zb: exact for any z.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .coupling import Coupling
from .layers import GATED

_FOLDED = ("weight", "bias")  # a layer's output is linear in these together


def adjustable(model: nn.Module, coupling: Coupling) -> Tensor:
    """Which units may have another gate than 1, [U] bool: all of a unit's places have weights to fold it into.

    Not so at a batch normalisation without γ and β; where ``weight`` or ``bias`` is no parameter (a parametrisation or
    a weight norm computes it) or holds no floating-point numbers; in attention and in a subclass with a forward of its
    own; and where two layers share a parameter that the gate would scale for one only.

    >>> from taylorkern.coupling import couple
    >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, affine=False))
    >>> model = model.append(nn.ReLU()).append(nn.Conv1d(3, 1, 1))
    >>> adjustable(model, couple(model, torch.rand(1, 1, 4))).tolist()
    [True, True, False, False, False]
    """
    able = torch.ones(len(coupling.units) + 1, dtype=torch.bool)
    for units, _ in _obstacles(model, coupling):
        able[units] = False  # index -1 finds the last entry, for what belongs to no unit
    return able[:-1]


def folded(model: nn.Module, coupling: Coupling, removed: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """The parameters that the gates z [U] change, by name, whole and in float64: still to be rounded.

    At every place of every unit γ and β, or the filter and its bias, are multiplied by z[u]. The statistics of a batch
    normalisation stay, for the gate is behind them. A parameter of several layers is multiplied once. Entries of the
    units ``removed`` (indices) are ignored. Nothing in the model changes.

    Raises ValueError where ``gates`` has another length, where the gate of a kept unit is not finite, and where it is
    not 1 although the unit is not :func:`adjustable`.

    >>> from taylorkern.coupling import couple
    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> model[0].bias.data = torch.tensor([1.0, -1.0])
    >>> new = folded(model, couple(model, torch.rand(1, 1)), torch.tensor([0]), torch.tensor([torch.nan, 3.0]))
    >>> sorted(new), new["0.bias"].tolist()
    (['0.bias', '0.weight'], [1.0, -3.0])
    """
    z = _table(coupling, removed, gates)
    _check_adjustable(model, coupling, z)
    uses = _uses(model, coupling)
    factors = {name: z[uses[parameter][0].units] for name, parameter in model.named_parameters()}
    return {
        name: parameter.detach().double() * factors[name].to(parameter.device)
        for name, parameter in model.named_parameters()
        if bool((factors[name] != 1).any())
    }


def rounded(name: str, parameter: Tensor, exact: Tensor) -> Tensor:
    """``exact`` in a tensor of its own, of the dtype and memory format of ``parameter``.

    Raises ValueError where it does not fit that dtype.

    >>> rounded("weight", torch.zeros(1, dtype=torch.bfloat16), torch.tensor([1.001], dtype=torch.float64))
    tensor([1.], dtype=torch.bfloat16)
    """
    new = torch.empty_like(parameter, requires_grad=False).copy_(exact)
    if not torch.equal(new.isfinite(), parameter.isfinite()):
        raise ValueError(
            f"{name} overflows {parameter.dtype} when the gates are folded into it; bound the gates, or leave them "
            "out where the weights are this large"
        )
    return new


@dataclass(frozen=True)
class _Use:
    """A parameter under one layer's name: the unit of the gate behind each of its numbers, -1 for none."""

    name: str
    units: Tensor  # int64, broadcastable to the parameter's shape


def _table(coupling: Coupling, removed: Tensor, gates: Tensor) -> Tensor:
    """z [U + 1] in float64, to be indexed by a tensor of units: 1 for removed ones and at index -1."""
    z, count = gates.detach().to("cpu", torch.float64), len(coupling.units)
    if z.shape != (count,):
        raise ValueError(f"gates has shape {tuple(z.shape)}, but the coupling has {count} units: it must be [{count}]")
    z = torch.cat([z, torch.ones(1, dtype=torch.float64)])
    z[removed] = 1
    for unit in (~z.isfinite()).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"the gate of unit {unit} {_place(coupling, unit)} is {float(z[unit])}; it must be finite")
    return z


def _check_adjustable(model: nn.Module, coupling: Coupling, z: Tensor) -> None:
    for units, reason in _obstacles(model, coupling):
        for unit in units[z[units] != 1].tolist()[:1]:
            raise ValueError(
                f"the gate of unit {unit} {_place(coupling, unit)} is {float(z[unit])} and can't be folded in: "
                f"{reason}; leave it at 1 (taylorkern.compensation.adjustable tells which units can have others)"
            )


def _place(coupling: Coupling, unit: int) -> str:
    layer, channel = coupling.units[unit].places[0]
    return f"({layer}, channel {channel})"


def _obstacles(model: nn.Module, coupling: Coupling) -> Iterator[tuple[Tensor, str]]:
    """Units whose gates can't be folded in, and why."""
    for path, units in coupling.layers.items():
        if reason := _without_producer(model.get_submodule(path)):
            yield units, f"{path} {reason}"
    for parameter, uses in _uses(model, coupling).items():
        yield from _torn(parameter, uses)


def _without_producer(layer: nn.Module) -> str:
    """What makes ``layer`` no producer to fold into, or "" where it is one."""
    kind = type(layer)
    if kind.forward not in {known.forward for pair in GATED.items() for known in pair}:
        return f"is a {kind.__name__}, with a forward of its own"
    for name in _FOLDED:
        held, seen = layer._parameters.get(name), getattr(layer, name, None)
        if held is None and seen is not None:
            return f"has a {name} that is no parameter: something else computes it"
        if held is None and name == "weight":
            return f"is a {kind.__name__} without a weight"
        if held is not None and not held.is_floating_point():
            return f"has a {name} of {held.dtype}, which is no floating-point type"
    return ""


def _torn(parameter: Tensor, uses: list[_Use]) -> Iterator[tuple[Tensor, str]]:
    """The units that would scale ``parameter`` for one of its ``uses`` and not, or otherwise, for another."""
    first = uses[0].units.expand(parameter.shape)
    for use in uses[1:]:
        other = use.units.expand(parameter.shape)
        differ = first != other
        if bool(differ.any()):
            units = torch.cat([first[differ], other[differ]]).unique()
            yield units, f"{uses[0].name} and {use.name} are one parameter, and would need different factors"


def _uses(model: nn.Module, coupling: Coupling) -> dict[nn.Parameter, list[_Use]]:
    """Every parameter under each of the layers' names for it, in the order of ``named_parameters``."""
    found: dict[nn.Parameter, list[_Use]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                units = coupling.layers.get(path) if name in _FOLDED else None
                plane = torch.tensor(-1) if units is None else _plane(module, parameter, units)
                found.setdefault(parameter, []).append(_Use(f"{path}.{name}".lstrip("."), plane))
    return found


def _plane(layer: nn.Module, parameter: Tensor, units: Tensor) -> Tensor:
    """The units [C] of ``layer``'s outputs along the dimension of ``parameter`` that makes these outputs."""
    if parameter.dim() == 1 or isinstance(layer, nn.Embedding):  # [vocabulary, C]
        return units
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # [inputs, C / groups, *kernel], group by group
        rows = units.view(layer.groups, -1).repeat_interleave(parameter.shape[0] // layer.groups, 0)
    else:
        rows = units.view(-1, 1)
    return rows.view(*rows.shape, *[1] * (parameter.dim() - 2))
