"""Training: the pruner of somebody else's loop, made when its model and optimisers are there, and its state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..coupling import Unit
from ..example import converted
from ..layers import GATED, convert
from ..pruner import Pruner


class Training:
    """Prunes one training by ``Pruner(model, example_inputs, ..., **arguments)``.

    ``pruner`` is None until :meth:`begin`; ``removed`` has the units of every round so far.

    >>> training = Training(torch.rand(4, 2), {"every": 1, "step": 3})
    >>> model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
    >>> training.begin(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    >>> model(torch.rand(4, 2)).square().mean().backward()
    >>> len(training.step()), training.figures()
    (3, {'pruning/units': 3, 'pruning/kept': 0.5})
    """

    def __init__(self, example_inputs: Any, arguments: Mapping[str, Any]) -> None:
        taken = {"model", "optimizer", "scaler"} & arguments.keys()
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))}: these are the trainer's; leave them out")
        self.example_inputs = example_inputs
        self.pruner: Pruner | None = None
        self.removed: list[list[Unit]] = []
        self._arguments = dict(arguments)
        self._units = 0

    @property
    def masks(self) -> bool:
        """Whether rounds mask."""
        return self._arguments.get("mode", "cut") == "mask"

    def refuse(self, processes: int) -> None:
        """Raise where several ``processes`` would cut, or where a training has been pruned already."""
        if processes > 1 and not self.masks:
            raise ValueError(
                f"{processes} processes train this model through a wrapper, which a cut would break; "
                "give mode='mask': what is masked is cut when training ends"
            )
        if self.pruner is not None:
            raise RuntimeError(
                "this callback has pruned a training already; make a new one to prune again (of what is left then), "
                "or train on without a callback"
            )

    def begin(self, model: nn.Module, optimizers: Iterable[Optimizer], scaler: Any = None) -> None:
        """Convert ``model`` as far as it is not, and make the pruner; raises what these raise."""
        given = {} if scaler is None else {"scaler": scaler}
        device = next(model.parameters()).device
        example = converted(self.example_inputs, lambda t: t.to(device))
        if any(type(module) in GATED for module in model.modules()):
            convert(model)
        self.pruner = Pruner(model, example, optimizer=list(optimizers), **given, **self._arguments)
        self._units = len(self.pruner.scores.units)

    def step(self) -> list[Unit]:
        """A step of the optimiser has been made; returns what went."""
        units = self.begun.step()
        if units:
            self.removed.append(units)
            self._units -= len(units)
        return units

    def finish(self) -> None:
        """Cut what is masked."""
        if self.pruner is not None and self.masks:
            self.pruner.cut()

    def figures(self) -> dict[str, float]:
        """How many units are left, and which part of the dense network's FLOPs, parameters or channels."""
        return {"pruning/units": self._units, "pruning/kept": self.begun.kept}

    def state_dict(self) -> dict[str, Any]:
        """Empty before :meth:`begin`."""
        if self.pruner is None:
            return {}
        return {"pruner": self.pruner.state_dict(), "units": self._units, "example_inputs": self.example_inputs}

    def resume(self, state: Mapping[str, Any], begin: Callable[[], None], load_weights: Callable[[], Any]) -> None:
        """``begin`` with the dense model, repeat the cuts of a :meth:`state_dict`, then ``load_weights``.

        Of several processes only the first goes on with the round's statistics, for they are its own.
        """
        self.example_inputs = state["example_inputs"]
        begin()
        pruner = self.begun
        pruner.load_state_dict(state["pruner"])
        self._units = state["units"]
        load_weights()
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            pruner.scores.reset()

    @property
    def begun(self) -> Pruner:
        """The pruner. Raises RuntimeError before :meth:`begin`."""
        if self.pruner is None:
            raise RuntimeError("there is no pruner before training begins")
        return self.pruner
