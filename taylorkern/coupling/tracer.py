"""Runs a model once and carries labels beside the data."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from ..channels import channel_dim
from ..emission import observed
from ..example import copied, run, tensors
from ..fit import fitted
from ..layers import gateable
from . import contraction, meeting, movement  # noqa: F401  (they fill the table of rules)
from .labels import Ledger, Place
from .modules import Running
from .numbers import countable, heads
from .rules import Call, Carried, Contraction, Evidence, not_understood, rule_for, signature
from .script import Step
from .source import line


class _Leaving(TorchFunctionMode):
    """Notices what makes Python objects of tensors without an operation."""

    _WAYS: ClassVar = {Tensor.numpy: "numpy", Tensor.tolist: "tolist", Tensor.__array__: "__array__"}

    def __init__(self, tracer: "Tracer") -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._WAYS:
            self._tracer.left(args[0], self._WAYS[func])
        return func(*args, **(kwargs or {}))


class Tracer(TorchDispatchMode):
    """Watches a model run, operation by operation; what it learns goes to ``ledger`` and ``evidence``."""

    def __init__(
        self,
        model: nn.Module,
        named: dict[str, Tensor],
        ledger: Ledger,
        evidence: Evidence,
        choices: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.ledger, self.evidence, self.choices = ledger, evidence, choices or {}
        self.model = model
        self.script: list[Step] = []
        self._turns: Counter[Place] = Counter()
        self.given: list[Tensor] = []  # labels of what the model returns
        self.channels: dict[str, Tensor] = {}  # gateable layer, in order of its first output → labels of its channels
        self.reached: set[str] = set()
        self.counting = True
        self._running = Running(model, self._leave)
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._sizes = {module: frozenset(countable(module).values()) for module in self._running.paths}
        self._heads = {module: frozenset(heads(module).values()) for module in self._running.paths}
        self._carried = WeakIdKeyDictionary()
        for name, tensor in named.items():
            self._carried[tensor] = Carried(ledger.strips(name, tensor))

    def trace(self, model: nn.Module, example_inputs: Any) -> None:
        """Run ``model`` and freeze what it returns: the caller's code relies on its shape."""
        self.script, self._turns = [], Counter()
        with torch.no_grad(), self._running.followed(), observed(self._emitted), _Leaving(self), self:
            outputs = list(tensors(run(model, copied(example_inputs))))
        if not outputs:
            raise ValueError(f"{type(model).__name__} returned no tensor on the example inputs")
        self.ledger.here = Place("model output", "")
        for output in outputs:
            if found := self._carried.get(output):
                self._pay(found)
                self.ledger.freeze(found.strips)
                self.given += [strip.labels for strip in found.strips]
                self.evidence.frontier.update(found.makers)

    def channel_of(self, layer: str) -> tuple[str, Tensor]:
        """``layer`` with the labels of its channels."""
        return layer, self.channels[layer]

    def made(self) -> Tensor:
        """The labels of everything that layers make."""
        filters = [labels for axis, labels in self.ledger.axes().items() if axis in self.evidence.filters]
        return torch.cat([torch.zeros(1, dtype=torch.int64), *filters, *self.channels.values()])

    @property
    def module(self) -> str:
        """The path of the module that runs."""
        return self._running.path

    def _leave(self, module: nn.Module, output: Any) -> None:
        if gateable(module) and isinstance(output, Tensor) and output in self._carried:
            self._emitted(module, output, channel_dim(module, output))

    def _emitted(self, module: nn.Module, output: Tensor, dim: int) -> None:
        """A gate of ``module`` would sit on ``output``."""
        found = self._carried.get(output)
        lines = [s.labels for s in found.strips if s.dim == dim] if found else []
        if found and len(lines) == 1 and module in self._running.paths:
            name = self._running.paths[module]
            found.makers = {name: True}
            self.ledger.unite(self.channels.setdefault(name, lines[0]), lines[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule, kwargs = rule_for(func), kwargs or {}
        if rule is None and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.reached.update(self._names[id(t)] for t in inputs if id(t) in self._names)
        layout = (inputs[0].shape, inputs[0].stride()) if inputs else (torch.Size(), ())
        place = Place(str(func), self.module, line())
        self._turns[place] += 1
        result = func(*args, **kwargs)
        call = self._call(func, args, kwargs, inputs, result, *layout)
        self.ledger.here = place
        if any(t in self._carried for t in inputs):
            self._follow(rule or not_understood, call)
        self._count(call, args, kwargs, result)
        return result

    def _call(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], result: Any, shape: torch.Size, stride: tuple
    ) -> Call:
        names, module = signature(func), self._running.module
        return Call(
            func=func,
            arguments={**names, **dict(zip(names, args, strict=False)), **kwargs},
            inputs=inputs,
            outputs=[t for t in tree_leaves(result) if isinstance(t, Tensor)],
            ledger=self.ledger,
            evidence=self.evidence,
            layer=self.module if module and gateable(module) else None,
            carried=self._carried.get,
            shape=shape,
            stride=stride,
            choices=self.choices,
            owned=self._heads[module] if module else frozenset(),
        )

    def _follow(self, rule: Any, call: Call) -> None:
        for tensor in call.labelled():
            found = self._carried[tensor]
            self._pay(found)
            call.mixed += tuple(labels for labels in found.mixed if not any(labels is known for known in call.mixed))
            for maker, exact in found.makers.items():
                call.makers[maker] = exact and call.makers.get(maker, True)
        inputs = [s.labels for t in call.labelled() for s in self._carried[t].strips]
        views = any(r.alias_info and not r.alias_info.is_write for r in call.func._schema.returns)
        found = rule(call)
        for i, output in enumerate(call.outputs):
            strips = found[i] if i < len(found) else []
            earlier = self._carried.get(output)
            if earlier and earlier.is_view:
                # What is written through a view shows up in its base, which can't be told who made it.
                self.evidence.frontier.update(call.makers.keys() - earlier.makers.keys())
            is_view = views or bool(earlier and earlier.is_view)
            self._carried[output] = Carried(strips, dict(call.makers), is_view, call.mixed, tuple(call.owed))
        self._note(call, inputs)

    def _pay(self, found: Carried) -> None:
        for labels, place in found.owed:
            self.ledger.freeze_labels(labels, place)

    def left(self, tensor: Tensor, how: str) -> None:
        """The values of ``tensor`` leave for Python, by ``how``, where nobody can follow them."""
        found = self._carried.get(tensor)
        if found:
            self._pay(found)
            self.ledger.here = Place(how, self.module, line())
            self.ledger.freeze(found.strips)
            self.evidence.frontier.update(found.makers)

    def _note(self, call: Call, inputs: list[Tensor]) -> None:
        """Write down what this call is to make of a cut, and which numbers of its module it was given."""
        module = self._running.module
        outputs = [self._carried[output].strips for output in call.outputs]
        lines = [[(strip.dim, strip.labels) for strip in strips] for strips in outputs]
        shapes = [output.shape for output in call.outputs]
        place = self.ledger.here
        self.script.append(
            Step(place, self._turns[place], type(module), shapes, lines, inputs, dict(call.counts))
        )  # fmt: skip
        if module and not fitted(module):
            for _, labels in (line for of_output in lines for line in of_output):
                if len(labels) in self._sizes[module]:
                    call.number(labels)

    def _count(self, call: Call, args: Any, kwargs: Any, result: Any) -> None:
        flops = flop_registry.get(call.func.overloadpacket) if self.counting else None
        if flops:
            self.evidence.contractions.append(Contraction(flops(*args, **kwargs, out_val=result), call.vectors))
