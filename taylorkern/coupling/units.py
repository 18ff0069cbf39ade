"""Coupling: the units of a model, and where each parameter dimension belongs to which."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..channels import BEHIND_BATCH, OVER_LAST, width
from .labels import Axis, Frozen
from .numbers import Attribute, bound
from .report import report

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
    attributes: dict[Attribute, Tensor] = field(default_factory=dict)  # that count units → units [value]
    stuck: int = 0  # sets of channels that go together and can't go

    @classmethod
    def alone(cls, layers: dict[str, nn.Module]) -> "Coupling":
        """A coupling that couples nothing: each output channel of each of ``layers`` is a unit. It can't be cut."""
        widths = {name: width(layer) for name, layer in layers.items()}
        starts = dict(zip(widths, _running_sum(list(widths.values())), strict=True))
        channels = {name: torch.arange(starts[name], starts[name] + width) for name, width in widths.items()}
        weights = {
            (f"{name}.weight", _filter_dim(layer)): channels[name]
            for name, layer in layers.items()
            if _filters(layer) == widths[name]
        }
        norms = {f"{n}.weight" for n, layer in layers.items() if isinstance(layer, (*BEHIND_BATCH, *OVER_LAST))}
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

    @property
    def free_units(self) -> float:
        """Units, as a part of all sets of channels that go together, the model's own inputs and outputs left out."""
        return len(self.units) / max(1, len(self.units) + self.stuck)

    def numbers(self, model: nn.Module, stays: Tensor) -> list[tuple[nn.Module, str, int]]:
        """The attributes that change where only what ``stays`` (see :meth:`staying`) is left, with their new values."""
        return [
            (model.get_submodule(path), name, int(stays[units].sum()))
            for (path, name), units in self.attributes.items()
            if not bool(stays[units].all())
        ]

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

        # Channels without a gate go with those that have one.
        layers = {name: new[units[stays[self.outputs[name]]]] for name, units in self.layers.items()}
        return replace(
            self,
            units=_units(layers, len(kept)),
            axes={axis: left(units) for axis, units in self.axes.items()},
            layers=layers,
            outputs={name: left(units) for name, units in self.outputs.items()},
            costs=[_cost_left(cost, stays, left) for cost in self.costs],
            attributes={attribute: left(units) for attribute, units in self.attributes.items()},
            dense=self.dense[kept],
        )

    def report(self, form: str = "text") -> str:
        """What can be cut and what stops the rest, by operation and line of the model's code, as "text" or "json".

        Raises ValueError for another form.
        """
        return report(self, form)


def resolve(
    tracer: "Tracer", unreached: tuple[str, ...], trained: bool, apart: Collection[str] = ()
) -> tuple[Coupling, Tensor]:
    """Turn what a trace has found into units, numbered by the first appearance of a place in execution order.

    The attributes of the modules ``apart`` stay as they are. Returns them with every label's unit [labels + 1].
    """
    found = tracer.ledger.components()
    component = found.root.masked_fill(found.stuck, 0)
    channels = tracer.made()
    gated = [name for name in tracer.channels if name in tracer.evidence.frontier]
    number = _by_first_appearance([component[tracer.channels[name]] for name in gated], len(component))
    unit = number[component]  # [labels + 1]
    outputs = {name: unit[labels] for name, labels in tracer.channels.items()}
    layers = _gates(tracer, gated, unit)
    axes = tracer.ledger.per_axis(unit)
    homeless = tracer.ledger.per_axis((component > 0) & (unit < 0))
    live = {axis for axis, units in axes.items() if bool((units >= 0).any())}
    count = int(number.max()) + 1
    coupling = Coupling(
        units=_units(layers, count),
        axes=axes,
        consumers=tracer.evidence.consumers & live,
        filters=tracer.evidence.filters & live,
        layers=layers,
        outputs=outputs,
        costs=[Cost(c.flops, tuple(unit[labels] for labels in c.vectors)) for c in tracer.evidence.contractions],
        frozen=found.named(torch.cat([channels, *_contracted(tracer)])),
        dense=torch.arange(count),
        unreached=unreached,
        ungated=tuple(a for a, found in homeless.items() if bool(found.any()) and a[0] not in unreached),
        trained=trained,
        attributes=bound(tracer.model, tracer.evidence.numbers, unit, apart),
        stuck=_stuck(tracer, found.loose, channels[(found.stuck | (unit < 0))[channels]]),
    )
    return coupling, unit


def _gates(tracer: "Tracer", gated: list[str], unit: Tensor) -> dict[str, Tensor]:
    """Layer → units of its channels that carry a gate: not those which only decide where attention looks.

    A unit that has no other channels keeps them all.
    """
    inner = tracer.ledger.alike(torch.cat([torch.zeros(0, dtype=torch.int64), *tracer.evidence.inner]))
    outer = {name: unit[labels].masked_fill(inner[labels], -1) for name, labels in map(tracer.channel_of, gated)}
    reached = torch.zeros(int(unit.max()) + 2, dtype=torch.bool)
    for units in outer.values():
        reached[units] = True
    found = {
        name: torch.where(reached[unit[labels]], outer[name], unit[labels])
        for name, labels in map(tracer.channel_of, gated)
    }
    return {name: units for name, units in found.items() if bool((units >= 0).any())}


def _contracted(tracer: "Tracer") -> list[Tensor]:
    """The labels along which weights are summed over."""
    return [labels for axis, labels in tracer.ledger.axes().items() if axis in tracer.evidence.contracted]


def _stuck(tracer: "Tracer", loose: Tensor, staying: Tensor) -> int:
    """How many sets the labels ``staying`` are of, without those of what the model returns."""
    found = loose[staying[staying > 0]].unique()
    given = loose[torch.cat([torch.zeros(1, dtype=torch.int64), *tracer.given])].unique()
    return int((~torch.isin(found, given)).sum())


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
    return 1 if isinstance(layer, (nn.modules.conv._ConvTransposeNd, nn.Embedding)) else 0


def _filters(layer: nn.Module) -> int:
    """Size of the weight's dimension of output channels: in a transposed convolution in groups, those of one group."""
    weight = getattr(layer, "weight", None)
    return weight.shape[_filter_dim(layer)] if isinstance(weight, Tensor) and weight.dim() else 0


def _running_sum(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]
