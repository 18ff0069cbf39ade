"""Runs a model once and carries labels beside the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from ..example import copied, run, tensors
from ..layers import gateable
from . import contraction, meeting, movement  # noqa: F401  (they fill the table of rules)
from .labels import Ledger, Place
from .rules import Call, Carried, Contraction, Evidence, not_understood, rule_for, signature


class Tracer(TorchDispatchMode):
    """Watches a model run, operation by operation; what it learns goes to ``ledger`` and ``evidence``."""

    def __init__(self, model: nn.Module, named: dict[str, Tensor], ledger: Ledger, evidence: Evidence) -> None:
        super().__init__()
        self.ledger, self.evidence = ledger, evidence
        self.channels: dict[str, Tensor] = {}  # gateable layer, in order of its first output → labels of its channels
        self.reached: set[str] = set()
        self.counting = True
        self._paths = {module: path for path, module in model.named_modules()}
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._stack: list[nn.Module] = []
        self._carried = WeakIdKeyDictionary()
        for name, tensor in named.items():
            self._carried[tensor] = Carried(ledger.strips(name, tensor))

    def trace(self, model: nn.Module, example_inputs: Any) -> None:
        """Run ``model`` and freeze what it returns: the caller's code relies on its shape."""
        self._stack = []
        with torch.no_grad(), self._module_paths(), self:
            outputs = list(tensors(run(model, copied(example_inputs))))
        if not outputs:
            raise ValueError(f"{type(model).__name__} returned no tensor on the example inputs")
        self.ledger.here = Place("model output", "")
        for output in outputs:
            if found := self._carried.get(output):
                self.ledger.freeze(found.strips)
                self.evidence.frontier.update(found.makers)

    @property
    def module(self) -> str:
        return self._paths[self._stack[-1]] if self._stack else ""

    @contextmanager
    def _module_paths(self) -> Iterator[None]:
        hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if module in self._paths:
            self._stack.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module not in self._paths:
            return
        while self._stack.pop() is not module:
            pass  # calls that ended in an exception which the model handled itself
        found = self._carried.get(output) if gateable(module) else None
        line = [s for s in found.strips if s.dim == channel_dim(module, output)] if found else []
        if found and len(line) == 1:
            name = self._paths[module]
            found.makers = {name: True}
            self.ledger.unite(self.channels.setdefault(name, line[0].labels), line[0].labels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule, kwargs = rule_for(func), kwargs or {}
        if rule is None and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.reached.update(self._names[id(t)] for t in inputs if id(t) in self._names)
        layout = (inputs[0].shape, inputs[0].stride()) if inputs else (torch.Size(), ())
        result = func(*args, **kwargs)
        call = self._call(func, args, kwargs, result, *layout)
        if any(t in self._carried for t in inputs):
            self._follow(rule or not_understood, call)
        self._count(call, args, kwargs, result)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any, result: Any, shape: torch.Size, stride: tuple[int, ...]) -> Call:
        names = signature(func)
        return Call(
            func=func,
            arguments={**names, **dict(zip(names, args, strict=False)), **kwargs},
            outputs=[t for t in tree_leaves(result) if isinstance(t, Tensor)],
            ledger=self.ledger,
            evidence=self.evidence,
            layer=self.module if self._stack and gateable(self._stack[-1]) else None,
            carried=self._carried.get,
            shape=shape,
            stride=stride,
        )

    def _follow(self, rule: Any, call: Call) -> None:
        self.ledger.here = Place(str(call.func), self.module)
        for tensor in call.labelled():
            for maker, exact in self._carried[tensor].makers.items():
                call.makers[maker] = exact and call.makers.get(maker, True)
        views = any(r.alias_info and not r.alias_info.is_write for r in call.func._schema.returns)
        found = rule(call)
        for i, output in enumerate(call.outputs):
            strips = found[i] if i < len(found) else []
            before = self._carried.get(output)
            if before and before.is_view:
                # What is written through a view shows up in its base, which can't be told who made it.
                self.evidence.frontier.update(call.makers.keys() - before.makers.keys())
            self._carried[output] = Carried(strips, dict(call.makers), views or bool(before and before.is_view))

    def _count(self, call: Call, args: Any, kwargs: Any, result: Any) -> None:
        flops = flop_registry.get(call.func.overloadpacket) if self.counting else None
        if flops:
            self.evidence.contractions.append(Contraction(flops(*args, **kwargs, out_val=result), call.vectors))


def channel_dim(module: nn.Module, output: Tensor) -> int:
    """Which dimension of a gateable layer's output holds its channels."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return 1
    return output.dim() - module.weight.dim() + 1  # type: ignore[operator]
