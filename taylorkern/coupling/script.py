"""What every operation of a model's run makes of a cut: the sizes that its outputs must have."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .labels import Place


@dataclass(frozen=True)
class Step:
    """One operation on labelled tensors: shapes of its outputs, and the labels along their dimensions."""

    place: Place
    turn: int  # how many times it has run there, this one counted
    kind: type  # of the module that called it
    shapes: list[torch.Size]
    lines: list[list[tuple[int, Tensor]]]  # of each output: (dim, labels)
    inputs: list[Tensor]  # labels that went in
    counts: dict[str, Tensor] = field(default_factory=dict)  # argument → labels that it is the number of

    def expected(self, stays: Tensor) -> list[tuple[int, ...]]:
        """Shapes of the outputs where only labels that ``stays`` [labels + 1] are left."""
        return [_left(shape, lines, stays) for shape, lines in zip(self.shapes, self.lines, strict=True)]

    def resembles(self, other: "Step") -> bool:
        """Whether it is the same line of code, in a module of the same class and of the same name in its own."""
        own, others = ((s.place.operation, s.place.line, s.kind, s.place.module.split(".")[-1]) for s in (self, other))
        return bool(self.place.line) and own == others

    def suspects(self, got: list[tuple[int, ...]] | None, expected: list[tuple[int, ...]]) -> list[Tensor]:
        """The labels to blame, the likeliest first, where the outputs came out as ``got``, or not at all (None)."""
        made = [labels for lines in self.lines for _, labels in lines]
        if got is None:
            return [*(a for a in self.inputs if not any(torch.equal(a, b) for b in made)), *self.inputs]
        wrong = [
            labels
            for lines, a, b in zip(self.lines, got, expected, strict=False)
            for dim, labels in lines
            if len(a) != len(b) or a[dim] != b[dim]
        ]
        return [*wrong, *self.inputs, *made]


def _left(shape: torch.Size, lines: list[tuple[int, Tensor]], stays: Tensor) -> tuple[int, ...]:
    sizes = list(shape)
    for dim in {dim for dim, _ in lines}:
        kept = [stays[labels] for at, labels in lines if at == dim]
        sizes[dim] = int(torch.stack(kept).all(0).sum())
    return tuple(sizes)
