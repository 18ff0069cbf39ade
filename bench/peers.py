"""Diagonals of curvature by BackPACK, by curvlinops and by taylorkern, per unit of one network in evaluation mode.

BackPACK and curvlinops know the curvature of parameters, so for them gates are made parameters, at one, and nothing
else asks for a gradient. taylorkern scores the network as it is.

A side is a function of a problem that prepares all it can and returns a call, which starts with a forward and returns
the diagonal [U] over the units.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact, DiagGGNMC, SumGradSquared
from backpack.extensions.backprop_extension import BackpropExtension
from curvlinops import EFLinearOperator, FisherMCLinearOperator, GGNLinearOperator, hutchinson_diag
from torch import Tensor, nn

import taylorkern as tk
from taylorkern.coupling import Coupling

Diagonal = Callable[[], Tensor]
BLOCK = 32  # columns that curvlinops multiplies at once


@dataclass(frozen=True)
class Problem:
    """A network, a minibatch, and what a unit is: all that goes together, or each channel of the layers ``alone``."""

    model: nn.Module
    x: Tensor
    target: Tensor
    alone: tuple[str, ...] = ()

    def scores(self) -> tk.Scores:
        model = tk.convert(copy.deepcopy(self.model))
        return tk.Scores(model, None, layers=self.alone) if self.alone else tk.Scores(model, self.x)


class Block(nn.Module):
    """Two convolutions and the identity beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))


def chain(width: int, size: int, classes: int) -> nn.Sequential:
    """Convolutions with and without batch normalisation, a hidden linear layer: no two channels share a unit."""
    first = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    third = [nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()]
    head = [nn.Linear(width * (size // 4) ** 2, 2 * width), nn.ReLU(), nn.Linear(2 * width, classes)]
    return nn.Sequential(*first, *second, *third, *head)


def residual(width: int, size: int, classes: int) -> nn.Sequential:
    """A stem and two blocks: the channels of the stem and of both blocks' second convolutions go together."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * (size // 4) ** 2, classes)]
    return nn.Sequential(*stem, Block(width), Block(width), *head)


NETWORKS = {"chain": chain, "residual": residual}


def problem(network: str, width: int, size: int, classes: int, batch: int, linked: bool = True) -> Problem:
    """A random network in float64 with statistics of batch normalisation as after some training."""
    torch.manual_seed(0)
    model = NETWORKS[network](width, size, classes).double().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, center in ((module.weight, 1.0), (module.bias, 0.0), (module.running_mean, 0.0)):
                tensor.normal_(center, 0.3)
            module.running_var.uniform_(0.5, 2)
    found = Problem(model, torch.randn(batch, 3, size, size).double(), torch.arange(batch) % classes)
    return found if linked else Problem(model, found.x, found.target, tuple(found.scores().coupling.layers))


def in_float32(p: Problem) -> Problem:
    return Problem(copy.deepcopy(p.model).float(), p.x.float(), p.target, p.alone)


@dataclass(frozen=True)
class Gated:
    """A network whose gates are parameters: ``gates[i]`` [C] holds those of the units ``units[i]`` [C]."""

    model: nn.Module
    coupling: Coupling
    gates: list[nn.Parameter]
    units: list[Tensor]

    def per_unit(self, values: list[Tensor]) -> Tensor:
        """What was found for each gate, as [U]."""
        units, found = torch.cat(self.units), torch.cat([v.detach().flatten() for v in values])
        diagonal = found.new_zeros(len(self.coupling.units))
        diagonal[units[units >= 0]] = found[units >= 0]
        return diagonal


def gated(p: Problem, gate: Callable[[nn.Module, nn.Parameter], nn.Module]) -> Gated:
    """The network with gates behind the layers that carry them; layers with the same units share one parameter."""
    coupling, model = p.scores().coupling, copy.deepcopy(p.model)
    shared: dict[tuple[int, ...], nn.Parameter] = {}
    for layer, units in coupling.layers.items():
        weight = shared.setdefault(tuple(units.tolist()), nn.Parameter(torch.ones(len(units), dtype=p.x.dtype)))
        parent, _, name = layer.rpartition(".")
        module = model.get_submodule(layer)
        setattr(model.get_submodule(parent), name, nn.Sequential(module, gate(module, weight)))
    return Gated(model, coupling, list(shared.values()), [torch.tensor(units) for units in shared])


class Multiply(nn.Module):
    """A gate as anyone would write it, and the quickest for curvlinops."""

    def __init__(self, layer: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, a: Tensor) -> Tensor:
        return a * self.weight.view(-1, *[1] * (a.dim() - 2))


def batch_norm(layer: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A gate of a kind that BackPACK knows: the scale of a normalisation whose statistics are 0 and 1.

    It is quicker there than a convolution of one channel each.
    """
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    gate = kind(len(weight), eps=0.0, dtype=weight.dtype).eval().requires_grad_(False)
    gate.weight = weight
    return gate


def ours(p: Problem, method: str, draws: int = 1) -> Diagonal:
    """h by ``method``, as training gets it: behind a forward, with the gates' own gradients."""
    scores = p.scores()

    def run() -> Tensor:
        scores.reset()
        logits = scores.model(p.x)
        scores.curvature(logits, p.target, method=method, draws=draws)
        nn.functional.cross_entropy(logits, p.target).backward()
        return 2 * scores.importance("obd")

    return run


def our_fisher(p: Problem) -> Diagonal:
    """The diagonal of the empirical Fisher, which the gates' own gradients give."""
    scores = p.scores()

    def run() -> Tensor:
        scores.reset()
        nn.functional.cross_entropy(scores.model(p.x), p.target).backward()
        return scores.importance("taylor_fg")

    return run


def by_backpack(p: Problem, extension: BackpropExtension, factor: float = 1.0, converter: bool = True) -> Diagonal:
    """What ``extension`` finds for the gates; ``converter`` rewrites skip connections so that BackPACK can follow."""
    explicit = gated(p, batch_norm)
    model = extend(explicit.model, use_converter=converter)
    loss = extend(nn.CrossEntropyLoss())

    def run() -> Tensor:
        with backpack(extension):
            loss(model(p.x), p.target).backward()
        explicit.model.zero_grad()
        return factor * explicit.per_unit([getattr(gate, extension.savefield) for gate in explicit.gates])

    return run


def by_operator(p: Problem, make: Callable, diagonal: Callable[..., Tensor]) -> Diagonal:
    """The ``diagonal`` of a curvlinops operator on the gates; ``make`` gets its arguments, in each call anew."""
    explicit = gated(p, Multiply)
    sizes = [len(gate) for gate in explicit.gates]

    def run() -> Tensor:
        operator = make(
            explicit.model,
            nn.CrossEntropyLoss(),
            explicit.gates,
            [(p.x, p.target)],
            check_deterministic=False,
            num_data=len(p.x),
        )
        return explicit.per_unit(list(diagonal(operator).split(sizes)))

    return run


def by_columns(operator: Callable) -> Tensor:
    """An operator's diagonal from its product with every unit vector, some at a time."""
    columns = torch.eye(operator.shape[0], dtype=operator.dtype).split(BLOCK, dim=1)
    starts = range(0, operator.shape[0], BLOCK)
    return torch.cat([(operator @ c).diagonal(-start) for start, c in zip(starts, columns, strict=True)])


def seeded(operator: Callable) -> Callable:
    """An operator that draws anew each time it is made: curvlinops' own seed is always the same."""
    seeds: Iterator[int] = itertools.count()
    return lambda *args, **kwargs: operator(*args, **kwargs, seed=next(seeds))


# Name: what it computes, and the side. Those that compute the same have the same word.
SIDES: dict[str, tuple[str, Callable[[Problem], Diagonal]]] = {
    "taylorkern, exact": ("Gauss-Newton", lambda p: ours(p, "exact")),
    "BackPACK, DiagGGNExact": ("Gauss-Newton", lambda p: by_backpack(p, DiagGGNExact())),
    "curvlinops, GGN by columns": ("Gauss-Newton", lambda p: by_operator(p, GGNLinearOperator, by_columns)),
    "taylorkern, mc": ("Monte Carlo", lambda p: ours(p, "mc")),
    "BackPACK, DiagGGNMC": ("Monte Carlo", lambda p: by_backpack(p, DiagGGNMC())),
    "curvlinops, MC Fisher by columns": (
        "Monte Carlo",
        lambda p: by_operator(p, seeded(FisherMCLinearOperator), by_columns),
    ),
    "taylorkern, sketch": ("random signs", lambda p: ours(p, "sketch")),
    "curvlinops, Hutchinson of GGN": (
        "random signs",
        lambda p: by_operator(p, GGNLinearOperator, lambda operator: hutchinson_diag(operator, 1)),
    ),
    "taylorkern, taylor_fg": ("empirical Fisher", our_fisher),
    "BackPACK, SumGradSquared": (
        "empirical Fisher",
        lambda p: by_backpack(p, SumGradSquared(), factor=len(p.x)),
    ),
    "curvlinops, EF by columns": ("empirical Fisher", lambda p: by_operator(p, EFLinearOperator, by_columns)),
}
