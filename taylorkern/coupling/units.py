"""Coupling: the units of a model, and where each parameter dimension belongs to which."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .labels import Axis, Frozen, Place

if TYPE_CHECKING:
    from .tracer import Tracer


@dataclass(frozen=True)
class Unit:
    """Channels that go together, each at the last place for a gate: (layer name, current channel number)."""

    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cost:
    """One contraction: after a cut it costs ``flops`` times the product of the fractions kept of ``vectors``.

    A vector holds the unit of each index along one dimension, -1 where it always stays. Flops are those of the
    example inputs, as ``torch.utils.flop_counter`` counts them.
    """

    flops: float
    vectors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Coupling:
    """The units of a model. Every tensor of units is int64 and holds unit indices, -1 for what can't be cut."""

    units: list[Unit]  # prunable, in order of first appearance
    axes: dict[Axis, Tensor]  # (parameter or buffer name, dim) → units [size], for every dim larger than 1
    consumers: set[Axis]  # along which weights are contracted: zeros there mask a unit as its consumers see it
    filters: set[Axis]  # along which the weights of convolutions and linear layers produce channels
    layers: dict[str, Tensor]  # gateable layer on the frontier → units [C]
    outputs: dict[str, Tensor]  # every gateable layer → units [C] of its output
    costs: list[Cost]
    frozen: list[Frozen]
    dense: Tensor  # index of each unit in the first, dense coupling
    unreached: tuple[str, ...] = ()  # parameters that no run used
    ungated: tuple[Axis, ...] = ()  # axes that could be cut had they a place for a gate
    trained: bool = False  # whether branches of training mode were seen too

    @classmethod
    def alone(cls, layers: dict[str, nn.Module]) -> "Coupling":
        """A coupling that couples nothing: each output channel of each of ``layers`` is a unit. It can't be cut."""
        widths = {name: _width(layer) for name, layer in layers.items()}
        starts = dict(zip(widths, _running_sum(list(widths.values())), strict=True))
        channels = {name: torch.arange(starts[name], starts[name] + width) for name, width in widths.items()}
        weights = {
            (f"{name}.weight", _filter_dim(layer)): channels[name]
            for name, layer in layers.items()
            if layer.weight is not None and _filters(layer) == widths[name]
        }
        norms = {f"{n}.weight" for n, layer in layers.items() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
        return cls(
            units=[Unit(((name, c),)) for name, width in widths.items() for c in range(width)],
            axes=weights,
            consumers=set(),
            filters={axis for axis in weights if axis[0] not in norms},
            layers=channels,
            outputs=channels,
            costs=[],
            frozen=[],
            dense=torch.arange(sum(widths.values())),
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash over names, shapes and units."""
        digest = hashlib.sha256()
        for table in (self.axes, self.layers):
            for key, units in sorted(table.items(), key=lambda item: str(item[0])):
                digest.update(f"{key}:{len(units)}:".encode() + units.cpu().numpy().tobytes())
        return digest.hexdigest()

    def staying(self, removed: Tensor) -> Tensor:
        """A bool table [U + 1] of what stays without the units ``removed``, to be indexed by a tensor of units."""
        stays = torch.ones(len(self.units) + 1, dtype=torch.bool)
        stays[removed] = False  # index -1 finds the last entry, for what belongs to no unit
        return stays

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` has every axis of this coupling, in its size."""
        sizes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        return all(name in sizes and sizes[name][dim] == len(units) for (name, dim), units in self.axes.items())

    def keep(self, kept: Tensor) -> "Coupling":
        """The coupling after a cut that leaves the units ``kept`` (indices, sorted), renumbered from 0."""
        new = torch.full((len(self.units) + 1,), -1)
        new[kept] = torch.arange(len(kept))
        stays = new >= 0
        stays[-1] = True

        def left(units: Tensor) -> Tensor:
            return new[units[stays[units]]]

        layers = {name: left(units) for name, units in self.layers.items()}
        return replace(
            self,
            units=_units(layers, len(kept)),
            axes={axis: left(units) for axis, units in self.axes.items()},
            layers=layers,
            outputs={name: left(units) for name, units in self.outputs.items()},
            costs=[_cost_left(cost, stays, left) for cost in self.costs],
            dense=self.dense[kept],
        )

    def report(self) -> str:
        """What can be cut and what stops the rest, for people."""
        lines = [
            f"{len(self.units)} units with {sum(len(u.places) for u in self.units)} gates in {len(self.layers)} layers"
        ]
        lines += [
            f"{f.labels} channels frozen by {Place(f.operation, f.module)}, such as {f.axis[0]} dim {f.axis[1]}"
            for f in self.frozen
        ]
        lines += [f"{name} dim {dim}: no place for a gate" for name, dim in self.ungated]
        lines += [f"{name} was not used in any run" for name in self.unreached]
        return "\n".join(lines)


def resolve(tracer: "Tracer", unreached: tuple[str, ...], trained: bool) -> Coupling:
    """Turn what a trace has found into units, numbered by the first appearance of a place in execution order."""
    component, frozen = tracer.ledger.components()
    gated = [name for name in tracer.channels if name in tracer.evidence.frontier]
    number = _by_first_appearance([component[tracer.channels[name]] for name in gated], len(component))
    unit = number[component]  # [labels + 1]
    outputs = {name: unit[labels] for name, labels in tracer.channels.items()}
    layers = {name: outputs[name] for name in gated if bool((outputs[name] >= 0).any())}
    axes = tracer.ledger.per_axis(unit)
    homeless = tracer.ledger.per_axis((component > 0) & (unit < 0))
    live = {axis for axis, units in axes.items() if bool((units >= 0).any())}
    count = int(number.max()) + 1
    return Coupling(
        units=_units(layers, count),
        axes=axes,
        consumers=tracer.evidence.consumers & live,
        filters=tracer.evidence.filters & live,
        layers=layers,
        outputs=outputs,
        costs=[Cost(c.flops, tuple(unit[labels] for labels in c.vectors)) for c in tracer.evidence.contractions],
        frozen=frozen,
        dense=torch.arange(count),
        unreached=unreached,
        ungated=tuple(a for a, found in homeless.items() if bool(found.any()) and a[0] not in unreached),
        trained=trained,
    )


def _by_first_appearance(components: list[Tensor], count: int) -> Tensor:
    """Unit number of every component [count], -1 for those (and component 0) that never appear."""
    seen = torch.cat([torch.zeros(0, dtype=torch.int64), *components])
    seen = seen[seen > 0]
    first = torch.full((count,), len(seen)).scatter_reduce_(0, seen, torch.arange(len(seen)), "amin")
    order = first.argsort(stable=True)[: int((first < len(seen)).sum())]
    number = torch.full((count,), -1)
    number[order] = torch.arange(len(order))
    return number


def _units(layers: dict[str, Tensor], count: int) -> list[Unit]:
    places: list[list[tuple[str, int]]] = [[] for _ in range(count)]
    for name, units in layers.items():
        for channel, unit in enumerate(units.tolist()):
            if unit >= 0:
                places[unit].append((name, channel))
    return [Unit(tuple(found)) for found in places]


def _cost_left(cost: Cost, stays: Tensor, left: Callable[[Tensor], Tensor]) -> Cost:
    flops = cost.flops
    for units in cost.vectors:
        flops *= float(stays[units].double().mean())
    return Cost(flops, tuple(left(units) for units in cost.vectors))


def _filter_dim(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


def _filters(layer: nn.Module) -> int:
    """Size of the weight's dimension of output channels: in a transposed convolution in groups, those of one group."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape[_filter_dim(layer)]


def _width(layer: nn.Module) -> int:
    for attribute in ("out_channels", "out_features", "num_features"):
        if hasattr(layer, attribute):
            return getattr(layer, attribute)
    raise ValueError(f"{type(layer).__name__} has no known number of output channels")


def _running_sum(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
