"""Draws what starts as a constant: a branch that begins as nothing could not be seen to be wrong."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from taylorkern.example import run

STATISTICS = {"running_mean", "running_var"}  # of buffers only these: others are masks, positions or frequencies
WEAK = 0.2  # a contraction whose weights make less of unit inputs is drawn up to 1


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Replace every constant parameter and statistic of ``model`` by random values in a sensible range."""
    for module in model.modules():
        _normalisation(module)
        buffers = [(name, b) for name, b in module.named_buffers(recurse=False) if name in STATISTICS]
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            if _is_constant(tensor):
                _draw(name, tensor)
    return model


@torch.no_grad()
def strengthen(model: nn.Module) -> nn.Module:
    """Scale up weights so small that their branch would vanish beside what it is added to."""
    for name, weight in model.named_parameters():
        fan_in = weight[0].numel() if weight.dim() > 1 else 0
        strength = float(weight.square().mean().sqrt()) * math.sqrt(fan_in)
        if 0 < strength < WEAK and "norm" not in name:
            weight.div_(strength)
    return model


@torch.no_grad()
def settle(model: nn.Module, inputs: Any) -> nn.Module:
    """Give batch normalisations the statistics of ``inputs``, roughly, or what they pass on would fade with depth."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    hooks = [norm.register_forward_pre_hook(_measure) for norm in norms]
    try:
        run(model.eval(), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return model


def _measure(norm: Any, given: tuple[Tensor, ...]) -> None:
    x = given[0].transpose(0, 1).flatten(1)  # [C, samples]
    norm.running_mean.copy_(x.mean(1))
    spread = x.var(1, correction=0)
    spread = spread.clamp(min=float(spread.mean()) / 4 + 1e-6)  # few samples: a channel can be all but constant in them
    norm.running_var.copy_(spread * torch.empty_like(spread).uniform_(0.5, 1.5))


def _normalisation(module: nn.Module) -> None:
    """Also where only some of the values are equal, as in a batch normalisation that starts a branch at zero."""
    constants = []
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
        constants = [module.weight, getattr(module, "running_var", None)]
        for t in (module.bias, getattr(module, "running_mean", None)):
            if t is not None:
                t.normal_(0, 0.1)
    for t in constants:
        if t is not None:
            t.uniform_(0.5, 1.5)


def _is_constant(t: Tensor) -> bool:
    return t.is_floating_point() and t.numel() > 0 and bool((t == t.flatten()[0]).all())


def _draw(name: str, t: Tensor) -> None:
    value = float(t.flatten()[0])
    wide = sum(size > 1 for size in t.shape) > 1
    if abs(value) >= 0.1:
        t.uniform_(0.5, 1.5).mul_(value)
    elif wide and name.endswith("weight"):
        nn.init.xavier_uniform_(t)
    elif wide or name.endswith(("bias", "beta", "mean", "token")):
        t.normal_(0, 0.1 if not wide else 0.3)
    else:
        t.uniform_(0.5, 1.5)  # a scale of a whole branch, such as 0 or 1e-6
