"""Parts: what a training consists of, each with a state, and the order in which the states are put back."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from .pruner import Pruner

_ORDER = (Pruner, nn.Module, Optimizer)  # a pruner's cuts first, for the others' shapes; what is none of these last


class Parts:
    """Objects with ``state_dict`` and ``load_state_dict``, by name; a ``torch.Generator`` is one too.

    Raises ValueError for one that has neither, a model in a wrapper, or a pruner whose model or optimiser is none of
    the parts.

    >>> model = nn.Linear(2, 1)
    >>> parts = Parts({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    >>> state = parts.state_dict()
    >>> state["optimizer"]["param_groups"][0]["lr"] = 0.2
    >>> parts.load_state_dict(state)
    >>> parts["optimizer"].param_groups[0]["lr"]
    0.2
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ValueError("nothing to keep: name the parts, Checkpoints(folder, model=model, optimizer=optimizer)")
        for name, part in parts.items():
            _check_part(name, part)
        self._parts = dict(parts)
        for name, part in parts.items():
            if isinstance(part, Pruner):
                self._check_pruned(name, part)

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def state_dict(self) -> dict[str, Any]:
        """The state of each; tensors are those in use, as in torch's own."""
        return {name: _state(part) for name, part in self._parts.items()}

    def check(self, states: Mapping[str, Any]) -> None:
        """Raise ValueError where the ``states`` are seen to be of other parts, before any is put back."""
        if states.keys() != self._parts.keys():
            raise ValueError(
                f"these are the states of {', '.join(sorted(states))}, and here are {', '.join(sorted(self._parts))}; "
                "give the same parts by the same names"
            )
        pruned = any(isinstance(part, Pruner) for part in self._parts.values())
        for name in self._in_order():
            part = self._parts[name]
            for kind, check in _CHECKS.items():
                if isinstance(part, kind) and (wrong := check(part, states[name], pruned)):
                    raise ValueError(f"part {name!r} does not fit its state: {wrong}; build it as it was then")

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Put the ``states`` back: a pruner's first, then models', optimisers' and the others', as they are given.

        Raises ValueError, naming the part, where one refuses its state; what was loaded before stays loaded.
        """
        self.check(states)
        loaded: list[str] = []
        for name in self._in_order():
            try:
                _load(self._parts[name], states[name])
            except Exception as error:
                before = f"{', '.join(loaded)} had been loaded" if loaded else "nothing was loaded"
                raise ValueError(f"part {name!r} refused its state ({before}): {error}") from error
            loaded.append(name)

    def _in_order(self) -> list[str]:
        def rank(name: str) -> int:
            kinds = [isinstance(self._parts[name], kind) for kind in _ORDER]
            return kinds.index(True) if any(kinds) else len(kinds)

        return sorted(self._parts, key=rank)

    def _check_pruned(self, name: str, pruner: Pruner) -> None:
        kept = [module for part in self._parts.values() if isinstance(part, nn.Module) for module in part.modules()]
        if not any(module is pruner.model for module in kept):
            raise ValueError(f"{name}= cuts a model that is none of the parts; give it as well: model=model")
        for optimizer in pruner.optimizers:
            if not any(part is optimizer for part in self._parts.values()):
                raise ValueError(
                    f"{name}= cuts an optimizer that is none of the parts; give it too: optimizer=optimizer"
                )
        for copy in pruner.copies:
            if not any(module is copy for module in kept):
                raise ValueError(
                    f"{name}= cuts a copy of the model that is none of the parts; give it too: average=average"
                )


def _check_part(name: str, part: Any) -> None:
    if isinstance(part, torch.Generator):
        return
    if not (callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))):
        raise ValueError(f"{name}= is a {type(part).__name__}, which has no state_dict() and load_state_dict()")
    if isinstance(part, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"{name}= is a {type(part).__name__}; give the model inside, {name}.module, and wrap after load()"
        )
    if isinstance(part, nn.Module) and "_orig_mod" in part._modules:
        raise ValueError(f"{name}= is compiled; give the model that it was compiled from")


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    put: Callable[[Any], object] = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
    put(state)


def _misfit_of_module(module: nn.Module, state: Mapping[str, Any], pruned: bool) -> str:
    """Where the tensors of ``state`` can't be the module's: not before a pruner cuts it either, if there is one."""
    own = module.state_dict()
    if other := sorted(own.keys() ^ state.keys()):
        return f"only one of them has {other[0]}"
    return next(_misfits(own, state, pruned), "")


def _misfits(own: Mapping[str, Any], state: Mapping[str, Any], pruned: bool) -> Iterator[str]:
    for name, here in own.items():
        there = state[name]
        if not (isinstance(here, Tensor) and isinstance(there, Tensor)):
            continue
        cut = pruned and here.dim() == there.dim() and all(a >= b for a, b in zip(here.shape, there.shape, strict=True))
        if here.shape != there.shape and not cut:
            yield f"its {name} is {list(here.shape)}, the state's {list(there.shape)}"


def _misfit_of_optimizer(optimizer: Optimizer, state: Mapping[str, Any], pruned: bool) -> str:
    own, other = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    return "" if own == other else f"its groups have {own} parameters, the state's {other}"


_CHECKS: dict[type, Callable[[Any, Any, bool], str]] = {
    nn.Module: _misfit_of_module,
    Optimizer: _misfit_of_optimizer,
}
