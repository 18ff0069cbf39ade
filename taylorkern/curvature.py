"""Cotangents at the logits whose outer products make up a loss's Hessian there: the start of a Gauss-Newton diagonal.

For a minibatch loss with Hessian Σ_n (1/N)·H_n at the logits f, each rule yields cotangents v of f's shape with
Σ v vᵀ = H_n for every sample ("exact"), or in expectation from a single one: "sketch" adds up the exact factor's
columns with random signs, "mc" samples from the model's own distribution. A unit's curvature is then
h_u = mean_n Σ_v (∂⟨f, v⟩/∂z[n, u])².
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(Protocol):
    """The Hessian of a mean loss at its logits [N, ...], factored. ``targets`` are the loss's own, or None."""

    def sketch(self, logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor: ...

    def mc(self, logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor: ...

    def exact(self, logits: Tensor, targets: Tensor | None) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of logits [N, K, *D] as ``F.cross_entropy`` averages it, at every position of D.

    With p the softmax, v_k = √p_k·(e_k - p), for diag(p) - p pᵀ = Σ_k v_k v_kᵀ. Class weights, label smoothing and
    ignored targets scale a position's Hessian by the weight that its loss has in the mean; they need targets, class
    indices [N, *D] or probabilities [N, K, *D].

    >>> f = torch.tensor([[1.0, 2.0, 0.0]])
    >>> p, columns = f.softmax(1)[0], torch.cat(list(CrossEntropy().exact(f, None)))
    >>> torch.allclose(columns.T @ columns, p.diag() - p.outer(p))
    True
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def sketch(self, logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        p = logits.softmax(1)
        signed = p.sqrt() * _signs(p, generator)
        return self._root_share(logits, targets) * (signed - p * signed.sum(1, keepdim=True))

    def mc(self, logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        p = logits.softmax(1)
        rows = p.movedim(1, -1).reshape(-1, p.shape[1])
        drawn = torch.multinomial(rows, 1, generator=generator).view(p.movedim(1, -1).shape[:-1])
        return self._root_share(logits, targets) * (p - F.one_hot(drawn, p.shape[1]).movedim(-1, 1).to(p.dtype))

    def exact(self, logits: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        p, share = logits.softmax(1), self._root_share(logits, targets)
        for k in range(p.shape[1]):
            e_k = torch.zeros_like(p)
            e_k[:, k] = 1
            yield from _one_position_each(share * p[:, k : k + 1].sqrt() * (e_k - p))

    def _root_share(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """√(N · the weight of a position in the mean), [N, 1, *D]."""
        positions = math.prod(logits.shape[2:])
        if targets is None:
            if self.weight is not None:
                raise ValueError("CrossEntropy with class weights needs the targets to weigh the positions by")
            return torch.full_like(logits[:, :1], positions**-0.5)
        mass, total = self._masses(logits, targets)
        return (logits.shape[0] * mass / total).sqrt().unsqueeze(1)

    def _masses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What each position's Hessian is multiplied by [N, *D], and what the sum of losses is divided by."""
        classes = logits.shape[1]
        weight = logits.new_ones(classes) if self.weight is None else self.weight.to(logits)
        even = weight.mean()
        if targets.is_floating_point():
            own = (targets.movedim(1, -1) * weight).sum(-1)
            return (1 - self.label_smoothing) * own + self.label_smoothing * even, logits.new_tensor(own.numel())
        counted = targets != self.ignore_index
        own = weight[targets.where(counted, 0).clamp(0, classes - 1)] * counted
        return (1 - self.label_smoothing) * own + self.label_smoothing * even * counted, own.sum()


@dataclass(frozen=True)
class _ElementWise:
    """A loss that is a mean over all elements, each with a curvature of its own: v = √(curvature / elements) · e."""

    curvature: Callable[[Tensor, Tensor | None], Tensor]
    noise: Callable[[Tensor, Tensor | None, torch.Generator | None], Tensor]  # a draw with that variance

    def sketch(self, logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return self._root(logits, targets) * _signs(logits, generator)

    def mc(self, logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return self.noise(logits, targets, generator) / math.sqrt(logits[0].numel())

    def exact(self, logits: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        root = self._root(logits, targets)
        for i in range(logits[0].numel()):
            one = torch.zeros_like(root).flatten(1)
            one[:, i] = root.flatten(1)[:, i]
            yield one.view_as(root)

    def _root(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        return (self.curvature(logits, targets) / logits[0].numel()).sqrt()


def _normal(logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
    return math.sqrt(2) * torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)


def _bernoulli(logits: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
    p = logits.sigmoid()
    return p - torch.bernoulli(p, generator=generator)


LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "mse": _ElementWise(lambda f, _: torch.full_like(f, 2.0), _normal),
    "bce_with_logits": _ElementWise(lambda f, _: f.sigmoid() * (-f).sigmoid(), _bernoulli),
}
METHODS = ("sketch", "mc", "exact")

_OWN = (
    f"Pass one of {', '.join(map(repr, LOSSES))}, a CrossEntropy, or a callable of (logits, targets) that returns the "
    "cotangents v, each of the logits' shape, with Σ v vᵀ = H, the loss's Hessian at one sample's logits"
)

# A user's own rule: logits and targets to cotangents v with Σ v vᵀ = H_n, one backward each.
Cotangents = Callable[[Tensor, Tensor | None], Iterable[Tensor]]


@torch.no_grad()
def cotangents(
    logits: Tensor,
    targets: Tensor | None,
    loss: str | Loss | Cotangents,
    method: str,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The cotangents of one draw: a single one for "sketch" and "mc", all of them for "exact" or a user's callable.

    Raises ValueError for logits that are no tensor, a loss without a rule or whose cotangents don't have the logits'
    shape, or an unknown method.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"logits must be one tensor, not a {type(logits).__name__}: pass the output that the loss takes"
        )
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"there is no rule for loss {loss!r}. {_OWN}")
    rule = LOSSES[loss] if isinstance(loss, str) else loss
    if callable(rule):
        yield from _of_callable(rule, logits.detach(), targets)
    elif method == "exact":
        yield from rule.exact(logits.detach(), targets)
    else:
        yield getattr(rule, method)(logits.detach(), targets, generator)


def _of_callable(rule: Cotangents, logits: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
    found = rule(logits, targets)
    name = getattr(rule, "__name__", type(rule).__name__)
    if isinstance(found, Tensor) or not isinstance(found, Iterable):
        kind = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"loss={name} returned {kind}, not cotangents: it seems to be the loss itself. {_OWN}")
    for v in found:
        if not isinstance(v, Tensor) or v.shape != logits.shape:
            shape = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"loss={name} gave a cotangent {shape} for logits {list(logits.shape)}. {_OWN}")
        yield v


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)


def _one_position_each(v: Tensor) -> Iterator[Tensor]:
    """v [N, K, *D] split into tensors that are zero but for one position of D: positions have no Hessian in common."""
    rows = v.reshape(*v.shape[:2], -1)
    for d in range(rows.shape[2]):
        one = torch.zeros_like(rows)
        one[..., d] = rows[..., d]
        yield one.view_as(v)
