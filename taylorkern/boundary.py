"""Boundary: where one minibatch ends and the next begins."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

Told = Callable[[Optimizer], None]


class Boundary:
    """Between forwards, or, with ``optimizers``, between what one of their steps sees and what the next one does.

    Before one steps, ``begins`` is called with it, and ``ends`` behind. Within a step, where a closure is run, several
    times perhaps, what was there when it began joins the first forward's, and every other forward is a minibatch.

    >>> import torch
    >>> optimizer, told = torch.optim.SGD([torch.zeros(1, requires_grad=True)]), []
    >>> boundary = Boundary(optimizer, lambda _: told.append("begins"), lambda _: told.append("ends"))
    >>> optimizer.step()
    >>> boundary.between_forwards, told
    (False, ['begins', 'ends'])
    """

    def __init__(self, optimizers: Optimizer | Iterable[Optimizer] | None, begins: Told, ends: Told) -> None:
        optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else optimizers
        self._by_steps = optimizers is not None
        self._inside: set[int] = set()  # optimisers that step now, by id
        self._begins, self._ends = begins, ends
        hooks = []
        for optimizer in map(_within, optimizers or ()):
            hooks.append(optimizer.register_step_pre_hook(_calling(weakref.WeakMethod(self._step_begins))))
            hooks.append(optimizer.register_step_post_hook(_calling(weakref.WeakMethod(self._step_ends))))
        self.hooked = bool(hooks)
        self.remove = weakref.finalize(self, _remove, hooks)

    @property
    def between_forwards(self) -> bool:
        """Whether a forward that begins now belongs to another minibatch than the last one."""
        return not self._by_steps or bool(self._inside)

    def _step_begins(self, optimizer: Optimizer) -> None:
        self._inside.add(id(optimizer))
        self._begins(optimizer)

    def _step_ends(self, optimizer: Optimizer) -> None:
        self._inside.discard(id(optimizer))  # perhaps of a step before, that was broken off
        self._ends(optimizer)


def _within(optimizer: Optimizer) -> Optimizer:
    """The one that steps, inside of those that accelerate makes."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def _calling(method: "weakref.WeakMethod[Told]") -> Callable[..., None]:
    """A hook that holds nobody alive."""

    def hook(optimizer: Optimizer, *_: Any) -> None:
        if (found := method()) is not None:
            found(optimizer)

    return hook


def _remove(hooks: Iterable[Any]) -> None:
    for hook in hooks:
        hook.remove()
