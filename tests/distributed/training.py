"""What the programs for torchrun share: a network, its minibatches by step and rank, and a loop that runs in each."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import taylorkern as tk
from tests.networks import residual

X = torch.ones(2, 2, 8, 8, dtype=torch.float64)


def minibatch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (4,), generator=generator)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return tk.convert(residual(4).to(dtype))


def sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=momentum)


def loss(network: nn.Module, step: int, rank: int) -> Tensor:
    x, target = minibatch(step, rank)
    return nn.functional.cross_entropy(network(x.to(next(network.parameters()).dtype)), target)


def made(
    momentum: float = 0.0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, tk.Pruner]:
    model = network(dtype)
    optimizer = sgd(model, momentum)
    options = {"every": 3, "step": 2, "target": 0.3, "of": "channels"} | options
    return model, optimizer, tk.Pruner(model, X.to(dtype), optimizer=optimizer, **options)


def trained(
    made: tuple[nn.Module, torch.optim.Optimizer, tk.Pruner],
    steps: range,
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
    after_step: Callable[[int], object] = lambda step: None,
) -> list[list[Any]]:
    """The places that went in each step; the model is wrapped anew when tensors have changed their shapes."""
    model, optimizer, pruner = made
    ddp, removed = wrap(model), []
    for step in steps:
        optimizer.zero_grad()
        loss(ddp, step, dist.get_rank()).backward()
        optimizer.step()
        units = pruner.step()
        if units and pruner.mode == "cut":
            ddp = wrap(model)
        removed.append([unit.places for unit in units])
        after_step(step)
    return removed


def counted() -> Counter[str]:
    """How often each way of telling one another something is gone from now on."""
    calls = Counter[str]()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("all_gather_object", "all_reduce", "broadcast", "barrier", "all_gather"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    return calls


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def leave(folder: str, found: Any) -> None:
    """Leave what this process has found, and end."""
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")
    dist.destroy_process_group()
