"""A minibatch: what several forwards and their backwards have brought, added up to one value per unit and statistic."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .folding import LayersFolding


@dataclass(frozen=True)
class Part:
    """One forward with the backwards that followed it.

    ``arrived`` has s [N, C] by layer, ``h`` [U] is the curvature if one was asked for, ``rows`` [., U] those whose
    squares it is, ``shares`` [U, layers] the mean abs(a·dL/da) where it is collected.
    """

    arrived: Mapping[str, list[Tensor]]
    h: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    shares: Tensor | None = None

    @property
    def samples(self) -> int:
        """N: of the layer that was given most."""
        return max(sum(len(s) for s in scores) for scores in self.arrived.values())


@dataclass(frozen=True)
class Values:
    """Of a minibatch of N ``samples``, [U] each: G, the same of normalisations alone, mean_n s̃², h if there is one.

    ``others`` are statistics that are collected on request, by name.
    """

    gate: Tensor
    bn_gate: Tensor
    fisher: Tensor
    h: Tensor | None
    others: dict[str, Tensor]
    samples: int

    def statistics(self) -> dict[str, Tensor]:
        """The minibatch's own value of every statistic."""
        values = {
            "gate": self.gate,
            "gate_squared": self.gate.square(),
            "gate_abs": self.gate.abs(),
            "fisher": self.fisher,
            "bn_gate_squared": self.bn_gate.square(),
            "fisher_change_squared": (self.fisher / 2 - self.gate).square(),
        }
        if self.h is not None:
            signed = self.h / 2 - self.gate
            values |= {"curvature": self.h, "change": signed, "change_squared": signed.square()}
        return values | self.others

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Values":
        """With ``function`` of every tensor."""
        tensors: dict[str, Any] = {name: None if t is None else function(t) for name, t in self._tensors().items()}
        return Values(**tensors, others={name: function(t) for name, t in self.others.items()}, samples=self.samples)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a number, for ``torch.save``."""
        return self._tensors() | {"others": dict(self.others), "samples": self.samples}

    def _tensors(self) -> dict[str, Any]:
        return {"gate": self.gate, "bn_gate": self.bn_gate, "fisher": self.fisher, "h": self.h}


class Minibatch:
    """Parts that one optimiser step sees: samples of all of them are samples of the minibatch, N in all.

    ``factor`` undoes a scale of the loss, None for none; ``summed`` says that the loss is a sum over samples, whose
    scores are made those of the mean.
    """

    def __init__(self, parts: Sequence[Part], factor: Tensor | None, summed: bool) -> None:
        self.parts = parts
        self.samples = sum(part.samples for part in parts)
        undone = [] if factor is None else [factor]
        if summed:
            undone.append(torch.tensor(1 / max(1, self.samples), dtype=torch.float64))
        self._factors = undone

    @property
    def curved(self) -> bool:
        """Whether a curvature was asked for in it."""
        return any(part.h is not None for part in self.parts)

    def scaled(self, value: Tensor, power: int = 1) -> Tensor:
        """``value``, made of the loss's scores to that ``power``, as the mean loss alone would have made it."""
        for factor in self._factors:
            value = value * factor.to(value.device) ** power
        return value

    def values(self, folding: LayersFolding, normalisations: frozenset[str], others: dict[str, Tensor]) -> Values:
        """Sums over units by ``folding``; ``normalisations`` are the layers that count for the second of them."""
        gates, fishers, of_normalisations = [], [], []
        for part in self.parts:
            gate, fisher = folding.gradients(part.arrived)
            those = {layer: scores for layer, scores in part.arrived.items() if layer in normalisations}
            all_of_them = len(those) == len(part.arrived)
            of_normalisations.append(gate if all_of_them else torch.zeros_like(gate) + folding.gradients(those)[0])
            gates.append(gate)
            fishers.append(self._weighed(fisher, part))
        return Values(
            self.scaled(_sum(gates)),
            self.scaled(_sum(of_normalisations)),
            self.scaled(_sum(fishers), 2),
            self._curvature(),
            others,
            self.samples,
        )

    def rows(self, made: Callable[[Mapping[str, list[Tensor]]], list[Tensor]]) -> list[Tensor]:
        """Rows of a Gram matrix over units, [n, U] each: the curvature's, or what is ``made`` of scores."""
        if self.curved:
            share = self._curved_share
            return [_times(row, share(part) ** 0.5) for part in self.parts for row in part.rows]
        rows = [(row, self.samples / max(1, part.samples)) for part in self.parts for row in made(part.arrived)]
        return [self.scaled(_times(row, weight**0.5)) for row, weight in rows]

    def shares(self) -> Tensor:
        """The mean of the parts' shares over all samples."""
        parts = [(part.shares, part.samples) for part in self.parts if part.shares is not None]
        total = max(1, sum(samples for _, samples in parts))
        return self.scaled(_sum([_times(shares, samples / total) for shares, samples in parts]))

    def _weighed(self, fisher: Tensor, part: Part) -> Tensor:
        """A part's N·Σ_n s², as one of a larger minibatch."""
        return _times(fisher, self.samples / max(1, part.samples))

    def _curvature(self) -> Tensor | None:
        curved = [(part, part.h) for part in self.parts if part.h is not None]
        return _sum([_times(h, self._curved_share(part)) for part, h in curved]) if curved else None

    def _curved_share(self, part: Part) -> float:
        """The share of a part in the samples of all whose curvature is known."""
        return part.samples / max(1, sum(other.samples for other in self.parts if other.h is not None))


def _times(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1 else value * weight


def _sum(values: Sequence[Tensor]) -> Tensor:
    total, *others = values
    for value in others:
        total = total + value
    return total
