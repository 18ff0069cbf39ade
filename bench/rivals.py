"""Other ways to score channels while a network trains: one function for each, from a workload to a prepared step.

Each scores the layers that carry a gate in taylorkern, and stops at numbers per layer: adding coupled channels and
keeping statistics, which taylorkern's own steps include, are left to the user. What each computes and what it can't is
said in ``RIVALS`` and ends in the tables.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.ways import Prepared, Scored, Way, places
from bench.workload import Workload


def hooks(w: Workload) -> Prepared:
    """Keep each activation, multiply it with its gradient when that comes.

    Activations must not be overwritten meanwhile. ReLUs are made to work out of place, and an output that something
    else overwrites (``out += identity``) is handed on as a copy.
    """
    model = out_of_place(w.model())
    attached = Hooks(model, places(w), overwritten(model, w))
    return Prepared(w.step(model, list(model.parameters())), lambda: attached.scores)


class Hooks:
    """Forward hooks that leave s [N, C] = (a * g).sum((2, 3)) in ``scores`` when backward comes by."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...], copied: set[str]) -> None:
        self.scores: Scored = {}
        for name in layers:
            model.get_submodule(name).register_forward_hook(self._keep(name, name in copied))

    def _keep(self, name: str, copied: bool) -> Callable:
        def hook(module: nn.Module, inputs: tuple, a: Tensor) -> Tensor:
            kept = a.detach()  # a itself would hold itself by its own hook

            def score(g: Tensor) -> None:
                self.scores[name] = (kept * g).sum((2, 3))

            a.register_hook(score)
            return a.clone() if copied else a

        return hook


def identity(w: Workload) -> Prepared:
    """γ·dγ + β·dβ of every batch normalisation, after backward: the batch's score, without reading an activation."""
    model = w.model()
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in places(w)}
    found: Scored = {}

    def after() -> None:
        with torch.no_grad():
            for name, bn in layers.items():
                found[name] = bn.weight * bn.weight.grad + bn.bias * bn.bias.grad

    return Prepared(w.step(model, list(model.parameters()), after), lambda: found)


def gates(w: Workload, samples: int) -> Prepared:
    """Multiply each layer's output by ones that ask for a gradient, [1, C, 1, 1] or one for each sample."""
    model = w.model()
    weights = list(model.parameters())
    found: Scored = {}
    z = multiplied(model, places(w), samples, w.dtype)

    def after() -> None:
        for name, gate in z.items():
            assert gate.grad is not None
            found[name] = gate.grad.flatten(1) if samples > 1 else gate.grad.flatten()
            gate.grad = None

    return Prepared(w.step(model, weights, after), lambda: found)


def multiplied(model: nn.Module, layers: tuple[str, ...], samples: int, dtype: torch.dtype) -> Scored:
    """Gates [samples, C, 1, 1] of ones behind ``layers``."""

    def behind(layer: Any) -> Tensor:
        channels, device = layer.weight.numel(), layer.weight.device
        gate = torch.ones(samples, channels, 1, 1, dtype=dtype, device=device, requires_grad=True)
        layer.register_forward_hook(lambda module, inputs, a: a * gate.to(a.dtype))  # under autocast a is narrower
        return gate

    return {name: behind(model.get_submodule(name)) for name in layers}


def functorch(w: Workload) -> Prepared:
    """vmap(grad(loss)) over the minibatch with respect to gates [C], in evaluation mode, beside a plain step."""
    model = w.model()
    step = w.step(model, list(model.parameters()))
    z = {}
    for name in places(w):
        layer: Any = model.get_submodule(name)
        z[f"{name}.gate"] = torch.ones_like(layer.weight.detach())
        layer.register_parameter("gate", nn.Parameter(z[f"{name}.gate"].clone(), requires_grad=False))
        layer.register_forward_hook(lambda module, inputs, a: a * module.gate[:, None, None])
    x, target = w.images(), w.labels()
    found: Scored = {}

    def loss(gate: Scored, image: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, gate, image[None]), label[None])

    def run() -> None:
        model.eval()
        for name, s in vmap(grad(loss), (None, 0, 0))(z, x, target).items():
            found[name.removesuffix(".gate")] = s / len(x)
        model.train(w.training)
        step()

    return Prepared(run, lambda: found)


def torch_pruning(w: Workload) -> Prepared:
    """Torch-Pruning's GroupTaylorImportance of every group, from the weights and their gradients after backward."""
    import torch_pruning  # type: ignore[import-untyped]

    model = w.model()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=w.images()[:1])
    model.train(w.training)
    importance = torch_pruning.importance.GroupTaylorImportance()
    groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))

    def after() -> None:
        for group in groups:
            importance(group)

    return Prepared(w.step(model, list(model.parameters()), after), dict)


def backpack(w: Workload) -> Prepared:
    """BackPACK's BatchGrad of gates that it knows as batch normalisations with statistics 0 and 1."""
    from backpack import backpack, extend  # type: ignore[import-untyped]
    from backpack.extensions import BatchGrad  # type: ignore[import-untyped]

    model = out_of_place(w.model())
    copied, weights = overwritten(model, w), list(model.parameters())
    z = {}
    for name in places(w):
        layer: Any = model.get_submodule(name)
        gate = nn.BatchNorm2d(layer.weight.numel(), eps=0.0, dtype=w.dtype).eval()
        gate.bias.requires_grad_(False)
        z[name] = extend(gate).weight
        behind = [gate, Copy()] if name in copied else [gate]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Sequential(layer, *behind))
    step = w.step(model, weights, lambda: found.update({name: gate.grad_batch for name, gate in z.items()}))
    found: Scored = {}

    def run() -> None:
        with backpack(BatchGrad()):
            step()
        for gate in z.values():
            gate.grad = None

    return Prepared(run, lambda: found)


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def out_of_place(model: nn.Module) -> nn.Module:
    """``model`` with no activation that overwrites its input."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            vars(module)["inplace"] = False
    return model


def overwritten(model: nn.Module, w: Workload) -> set[str]:
    """Layers whose outputs something overwrites in a forward."""
    with recorded(model, places(w)) as outputs:
        model(w.images()[:2])
        return {name for name, a in outputs.items() if a._version}


@contextmanager
def recorded(model: nn.Module, layers: tuple[str, ...]) -> Iterator[Scored]:
    """Within, the outputs of ``layers`` by name."""
    outputs: Scored = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, a: outputs.__setitem__(name, a)

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


LIGHT = [
    Way(
        "hooks",
        hooks,
        "s [N, C], by (a * g).sum((2, 3)) in tensor hooks",
        "keeps every scored activation; silently wrong where an activation is overwritten and not copied; breaks the "
        "graph under torch.compile",
        "s",
    ),
    Way(
        "γ·dγ + β·dβ",
        identity,
        "G [C], from gradients that are there anyway",
        "no sample by itself, so no Fisher and no Gauss-Newton; layers behind a batch normalisation only",
        "G",
    ),
    Way(
        "gates [1, C]",
        lambda w: gates(w, 1),
        "G [C], as the gradient of gates that are really multiplied (the paper's own code)",
        "no sample by itself, so no Fisher and no Gauss-Newton",
        "G",
    ),
    Way(
        "gates [N, C]",
        lambda w: gates(w, w.batch),
        "s [N, C], as the gradient of gates that are really multiplied",
        "a product and its gradient are written for every scored layer",
        "s",
    ),
]
HEAVY = [
    Way(
        "functorch",
        functorch,
        "s [N, C] in evaluation mode, by vmap(grad) over gates, beside the plain step",
        "refuses batch normalisation in training with running statistics; a forward and a backward of its own",
        "s",
        training=False,
    ),
    Way(
        "Torch-Pruning",
        torch_pruning,
        "GroupTaylorImportance: Σ abs(w·dw) over each group's convolutions and linear layers",
        "another quantity: absolute before the sum, not squared, no sample by itself; gradients of batch "
        "normalisations are never read",
    ),
    Way(
        "BackPACK",
        backpack,
        "s [N, C], as BatchGrad of gates that are batch normalisations with statistics 0 and 1",
        "the gates are really multiplied; in-place operations behind them are refused; no DiagGGN in training mode",
        "s",
    ),
]
RIVALS = [*LIGHT, *HEAVY]
