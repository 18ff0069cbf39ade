"""Runs that go on after a cut, beside dense ones that are masked by hand, and what must be the same in both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taylorkern as tk
from taylorkern.coupling import couple
from tests.networks import randomised, residual

BEFORE, AFTER, CLASSES = 5, 20, 5


class Mixed(nn.Module):
    """Depthwise, grouped and concatenated: channels that pass through, go by groups, and stand side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise, self.behind = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.beside = nn.BatchNorm2d(5, momentum=None)
        self.wide, self.grouped = nn.Conv2d(9, 6, 1), nn.Conv2d(6, 9, 3, groups=3)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.behind(self.depthwise(F.relu(self.norm(self.stem(x))))))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.beside(self.right(x)))], 1)
        return self.head(F.relu(self.grouped(F.relu(self.wide(x)))).mean((2, 3)))


class Tokens(nn.Module):
    """Two MLP blocks of a transformer over 8 tokens, their hidden widths free and the stream's kept by its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.up, self.down = (nn.ModuleList(nn.Linear(*io) for _ in range(2)) for io in ((6, 11), (11, 6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), 8, 16))
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(self.norms[2](x).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "mixed": lambda: randomised(Mixed()),
    "tokens": Tokens,
}
AS = {
    "plain": lambda model: model,
    "converted": tk.convert,
    "fused": lambda model: tk.convert(model, fuse=True),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (7,), generator=generator)


@dataclass
class Run:
    """A model in training with its optimiser and the moving average of its weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel
    clip: float | None = None

    def train(self, steps: range, after_step: Callable[[], object] = lambda: None) -> list[float]:
        losses = []
        for step in steps:
            x, target = batch(step)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), target)
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            after_step()
            self.average.update_parameters(self.model)
            losses.append(loss.item())
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must be the same, by where it is: "model", "average", the optimiser's key, and the name."""
        found = {f"{kind}: {name}": t for kind, m in self._bodies() for name, t in m.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{key}: {name}"] = value
        return found

    def _bodies(self):
        return (("model", self.model), ("average", self.average.module))


def run(build: Callable[[], nn.Module], optimizer, use_buffers: bool = True, clip: float | None = None) -> Run:
    """A run of ``BEFORE`` steps; the same arguments give the same run."""
    torch.manual_seed(0)
    model = build().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    made = Run(model, optimizer(model.parameters()), average, clip)
    made.train(range(BEFORE))
    return made


def left(tensors: dict[str, Tensor], coupling: tk.coupling.Coupling, removed: Tensor) -> dict[str, Tensor]:
    """What is left of a dense run's tensors without the units ``removed``."""
    cut = {}
    for where, tensor in tensors.items():
        for dim, size in enumerate(tensor.shape):
            units = coupling.axes.get((where.split(": ")[1], dim))
            if units is not None and len(units) == size:
                tensor = tensor.index_select(dim, (~torch.isin(units, removed)).nonzero().flatten())
        cut[where] = tensor
    return cut


def some(coupling: tk.coupling.Coupling) -> Tensor:
    """Every third unit, from the second on."""
    return torch.arange(1, len(coupling.units), 3)


@contextmanager
def masked_by_hand(model: nn.Module, coupling: tk.coupling.Coupling, removed: Tensor) -> Iterator[None]:
    """Within, the layers that sum over channels see zeros in place of the removed ones."""

    def zeros(units: Tensor, channels: int):
        stays = (~torch.isin(units, removed)).double()
        return lambda module, args: (args[0] * stays.view(-1, *[1] * (-channels - 1)),)

    dims = {nn.Conv2d: -3, nn.Linear: -1}
    hooks = []
    for name, module in model.named_modules():
        dim = next((dim for kind, dim in dims.items() if isinstance(module, kind)), None)
        units = coupling.axes.get((f"{name}.weight", 1))
        if dim is not None and units is not None and getattr(module, "groups", 1) == 1:
            hooks.append(module.register_forward_pre_hook(zeros(units, dim)))
    assert hooks
    yield
    for hook in hooks:
        hook.remove()


def coupled(model: nn.Module) -> tk.coupling.Coupling:
    return couple(model, batch(0)[0][:2])


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for where, tensor in got.items():
        assert tensor.shape == expected[where].shape, where
        torch.testing.assert_close(tensor, expected[where], rtol=1e-8, atol=1e-8, msg=lambda m, w=where: f"{w}: {m}")
