"""A minibatch's full second derivatives along the gates, by autograd through gates that really multiply."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern.coupling import Coupling


@contextmanager
def gated(model: nn.Module, coupling: Coupling, z: Tensor) -> Iterator[None]:
    """Within, every channel of unit u is multiplied by z[u], z [U], wherever it has a place."""
    padded = torch.cat([z, torch.ones_like(z[:1])])  # index -1: channels of no unit

    def multiplying(units: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, inputs, output: output * padded[units].view(-1, *[1] * (output.dim() - 2))

    handles = [model.get_submodule(name).register_forward_hook(multiplying(u)) for name, u in coupling.layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy in training mode that leaves its running statistics alone, so that a forward is a pure function."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
    return model


def loss_at(model: nn.Module, coupling: Coupling, x: Tensor, targets: Tensor, z: Tensor) -> Tensor:
    """The mean cross-entropy with the units' gates at z [U]."""
    with gated(model, coupling, z):
        return F.cross_entropy(model(x), targets)


def gradient_and_hessian(model: nn.Module, coupling: Coupling, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """G [U] and H [U, U] of the mean cross-entropy at z = 1."""
    z = torch.ones(len(coupling.units), dtype=x.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_at(model, coupling, x, targets, z), z, create_graph=True)
    basis = torch.eye(len(z), dtype=x.dtype)
    (hessian,) = torch.autograd.grad(gradient, z, basis, is_grads_batched=True)
    return gradient.detach(), hessian


def gauss_newton(model: nn.Module, coupling: Coupling, x: Tensor) -> Tensor:
    """The Gauss-Newton matrix [U, U] of the mean cross-entropy: mean_n J_nᵀ (diag(p_n) - p_n p_nᵀ) J_n.

    J_n [K, U] holds the derivatives of sample n's logits by the shared gates z [U] at 1. With batch statistics that
    counts what a gate does to sample n through the other samples as well.
    """

    def logits(z: Tensor) -> Tensor:
        with gated(model, coupling, z):
            return model(x)

    ones = torch.ones(len(coupling.units), dtype=x.dtype)
    with torch.no_grad():
        p = model(x).softmax(1)
        jacobian = torch.func.jacfwd(logits)(ones)  # [N, K, U]
    at_logits = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nku,nkl,nlv->uv", jacobian, at_logits, jacobian) / len(x)
