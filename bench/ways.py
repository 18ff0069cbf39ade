"""What every way of scoring a training step has in common, and the ways that are plain or taylorkern's own."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import taylorkern as tk
from bench.workload import Run, Workload

Scored = dict[str, Tensor]  # by layer


@dataclass(frozen=True)
class Prepared:
    """A way made ready for one workload, with a model of its own.

    ``scores`` returns what the last step found for each layer of ``places``: [N, C] or [C].
    """

    step: Run
    scores: Callable[[], Scored]


@dataclass(frozen=True)
class Way:
    """A way of taking a training step.

    ``quantity`` is "s" for gate gradients [N, C] of every layer, "G" for their sums over the minibatch, [C], and ""
    where it finds none or something else. ``training`` is False where its scores are those of evaluation mode,
    ``checked_small`` where a smaller or wider minibatch would run other code than what is timed.
    """

    name: str
    prepare: Callable[[Workload], Prepared]
    computes: str
    lacks: str
    quantity: str = ""
    training: bool = True
    checked_small: bool = True


@functools.cache
def places(w: Workload) -> tuple[str, ...]:
    """The layers that carry a gate in taylorkern; rivals score the same ones, so that none does more than it has to."""
    return tuple(tk.couple(tk.convert(w.model()), w.images()[:1]).layers)


def plain(w: Workload) -> Prepared:
    model = w.model()
    return Prepared(w.step(model, list(model.parameters())), dict)


def converted(w: Workload, fuse: bool) -> Prepared:
    model = tk.convert(w.model(), fuse=fuse)
    return Prepared(w.step(model, list(model.parameters())), dict)


def scored(w: Workload, fuse: bool) -> Prepared:
    model = tk.convert(w.model(), fuse=fuse)
    scores = tk.Scores(model, w.images()[:1])

    def arrived() -> Scored:
        """Taken out of the gates, so the statistics miss that minibatch."""
        assert scores.model is model
        return {name: _gate(model.get_submodule(name)) for name in scores.coupling.layers}

    return Prepared(w.step(model, list(model.parameters())), arrived)


def _gate(layer: Any) -> Tensor:
    (s,) = layer.gate.drain()
    return s


OURS = [
    Way("plain", plain, "nothing: torch's own training step", ""),
    Way("plain again", plain, "nothing: a second plain model, so the noise of every figure", ""),
    Way("converted", lambda w: converted(w, fuse=False), "nothing: taylorkern's layers with nobody scoring", ""),
    Way(
        "scored",
        lambda w: scored(w, fuse=False),
        "s [N, C] of every gated layer, summed over coupled channels, folded into taylor_fo, taylor_fo_abs and the "
        "empirical Fisher",
        "",
        "s",
    ),
    Way("fused", lambda w: converted(w, fuse=True), "nothing: fused layers with nobody scoring", ""),
    Way("fused, scored", lambda w: scored(w, fuse=True), "the same as scored, in fused layers", "", "s"),
]
