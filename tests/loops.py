"""Training loops as people write them, over one network and the same samples, and what scores came of each."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylorkern as tk
from taylorkern.coupling import Coupling
from taylorkern.criteria import criterion
from tests.networks import randomised, with_gates

CRITERIA = ("taylor_fo", "taylor_fg", "taylor_so_fisher", "taylor_output", "taylor_weight")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16 + GradScaler": torch.float16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


class Net(nn.Module):
    """Convolutions before a batch normalisation, an in-place ReLU and an addition, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.group = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.last, self.hidden, self.out = nn.Conv2d(8, 12, 3), nn.Linear(12, 9), nn.Linear(9, 5)

    def block(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        return x + self.group(self.inner(x)).relu_()

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if checkpointed else self.block(x)
        return self.out(self.hidden(self.last(x).relu_().mean((2, 3))).relu())


def network() -> nn.Module:
    torch.manual_seed(0)
    return tk.convert(randomised(Net())).eval()


def samples(count: int = 16, steps: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, 8, 8)
    return [
        (torch.randn(shape, generator=generator), torch.randint(0, 5, (count,), generator=generator))
        for _ in range(steps)
    ]


@dataclass(frozen=True)
class Loop:
    """Mixed precision, a compiler's backend or none, backwards to a step, and whether a block is checkpointed."""

    precision: str = "fp32"
    backend: str | None = None
    accumulated: int = 1
    checkpointed: bool = False
    training: bool = False

    def run(self, model: nn.Module, rate: float = 0.0) -> tk.Scores:
        """Scores of a step for each of :func:`samples`."""
        torch._dynamo.reset()
        optimizer = torch.optim.SGD(model.parameters(), rate)
        enabled = self.precision == "fp16 + GradScaler"
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        first = samples()[0][0][:1]
        scores = tk.Scores(model, first, criteria=CRITERIA, optimizer=optimizer, scaler=scaler)
        model.train(self.training)
        compiled = partial(torch.compile, backend=self.backend, fullgraph=True) if self.backend else lambda model: model
        forward = compiled(model)
        for x, target in samples():
            for part, wanted in zip(x.chunk(self.accumulated), target.chunk(self.accumulated), strict=True):
                with torch.autocast("cpu", DTYPES[self.precision], enabled=self.precision != "fp32"):
                    logits = forward(part, self.checkpointed)
                loss = nn.functional.cross_entropy(logits.float(), wanted) / self.accumulated
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return scores


def importances(scores: tk.Scores) -> dict[str, Tensor]:
    return {name: scores.importance(name) for name in CRITERIA}


def by_autograd(precision: str, training: bool = False) -> dict[str, Tensor]:
    """The same importances with no code of ours but the coupling: gates that multiply, gradients of what is there."""
    model = network()
    scores = tk.Scores(model, samples()[0][0][:1])
    coupling, units = scores.coupling, scores.units
    scores.detach()
    model.train(training)
    sums = dict.fromkeys(("s", "fisher", "change", "shares", "weight"), torch.zeros((), dtype=torch.float64))
    scale = 1024.0 if precision == "fp16 + GradScaler" else 1.0
    for x, target in samples():
        z = torch.ones(len(x), len(units), requires_grad=True)
        outputs: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(layer).register_forward_hook(partial(_keep, outputs, layer))
            for layer in coupling.layers
        ]
        hooks += with_gates(model, units, z)
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
            logits = model(x)
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        (scale * nn.functional.cross_entropy(logits.float(), target)).backward()
        s = z.grad.double() / scale
        fisher = len(x) * s.square().sum(0)
        found = {
            "s": s.sum(0).square(),
            "fisher": fisher,
            "change": (fisher / 2 - s.sum(0)).square(),
            "shares": _shares(outputs, coupling) / scale,
            "weight": _weight_squares(model, coupling) / scale**2,
        }
        sums = {name: total + found[name] / 2 for name, total in sums.items()}
    shares = criterion("taylor_output").formula(sums.pop("shares"))
    gate, fisher, change, weight = sums.values()
    return dict(zip(CRITERIA, (gate, fisher, change, shares, weight), strict=True))


def _keep(outputs: dict[str, Tensor], layer: str, module: nn.Module, inputs: object, output: Tensor) -> None:
    output.retain_grad()
    outputs[layer] = output


def _shares(outputs: dict[str, Tensor], coupling: Coupling) -> Tensor:
    shares = torch.zeros(len(coupling.units), len(outputs), dtype=torch.float64)
    for column, (layer, a) in enumerate(outputs.items()):
        product = (a.detach() * a.grad).double().abs()
        means = product.mean([d for d in range(a.dim()) if d != 1])
        of = coupling.layers[layer]
        shares[:, column].index_add_(0, of[of >= 0], means[of >= 0])
    return shares


def _weight_squares(model: nn.Module, coupling: Coupling) -> Tensor:
    total = torch.zeros(len(coupling.units), dtype=torch.float64)
    for name, dim in coupling.filters:
        weight = model.get_parameter(name)
        product = (weight.detach() * weight.grad).double().square()
        of = coupling.axes[name, dim]
        total.index_add_(0, of[of >= 0], product.movedim(dim, 0).flatten(1).sum(1)[of >= 0])
    return total


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference between two loops' importances, beside the largest importance of its criterion."""
    return max(distances(found, wanted).values())


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """The same by criterion."""
    return {name: float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in CRITERIA}
