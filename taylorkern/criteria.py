"""Criteria: from statistics per unit to one importance per unit. Pure functions, one per criterion.

G is a unit's gate gradient for a minibatch (the sum over n of s[n, u]), s̃[n, u] = N·s[n, u] the per-sample gate
gradient under a mean loss, E_b the mean over minibatches. See Molchanov et al., CVPR 2019, for the methods' numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """``formula`` of the statistics named in ``needs``, in that order; all are [U] and float64."""

    needs: tuple[str, ...]
    formula: Callable[..., Tensor]


def taylor_fo(gate_squared: Tensor) -> Tensor:
    """E_b[G²]: first-order Taylor expansion of the loss in the gate, squared (method 22)."""
    return gate_squared


def taylor_fo_abs(gate_abs: Tensor) -> Tensor:
    """E_b[abs(G)]."""
    return gate_abs


def taylor_fg(fisher: Tensor) -> Tensor:
    """E_b[mean_n s̃²]: the diagonal of the gate's empirical Fisher (method 23, "full gradient")."""
    return fisher


def taylor_so(change_squared: Tensor) -> Tensor:
    """E_b[(½h - G)²]: second-order Taylor expansion, squared, h the Gauss-Newton diagonal (method 11)."""
    return change_squared


def taylor_so_fisher(fisher_change_squared: Tensor) -> Tensor:
    """E_b[(½h - G)²] with the empirical Fisher mean_n s̃² for h: second order without another backward."""
    return fisher_change_squared


def obd(curvature: Tensor) -> Tensor:
    """E_b[½h]: Optimal Brain Damage (method 10)."""
    return curvature / 2


def taylor_output(output_abs: Tensor) -> Tensor:
    """E_b[mean over n and S of abs(a·dL/da)], divided by its ℓ2 norm over the layer (method 6, from ICLR 2017).

    ``output_abs`` is [U, layers]; a unit of several layers has the sum of its shares in them.
    """
    return (output_abs / output_abs.norm(dim=0).clamp_min(torch.finfo(output_abs.dtype).tiny)).sum(1)


def bn_taylor(bn_gate_squared: Tensor) -> Tensor:
    """E_b[(γ·dγ + β·dβ)²], summed over a unit's batch-normalisation channels before the square (method 31)."""
    return bn_gate_squared


def taylor_weight(weight_squared: Tensor) -> Tensor:
    """E_b[sum over the filter's weights of (w·dw)²] (method 0)."""
    return weight_squared


def bn_scale(scale: Tensor) -> Tensor:
    """abs(γ), summed over a unit's batch-normalisation channels (method 30)."""
    return scale


def magnitude(filter_norm: Tensor) -> Tensor:
    """ℓ2 norm of the unit's filters (method 2)."""
    return filter_norm


def random(uniform: Tensor) -> Tensor:
    """Uniform on [0, 1), seeded, the same for a unit through all rounds (method 1)."""
    return uniform


CRITERIA: dict[str, Criterion] = {
    "taylor_fo": Criterion(("gate_squared",), taylor_fo),
    "taylor_fo_abs": Criterion(("gate_abs",), taylor_fo_abs),
    "taylor_fg": Criterion(("fisher",), taylor_fg),
    "taylor_so": Criterion(("change_squared",), taylor_so),
    "taylor_so_fisher": Criterion(("fisher_change_squared",), taylor_so_fisher),
    "obd": Criterion(("curvature",), obd),
    "taylor_output": Criterion(("output_abs",), taylor_output),
    "bn_taylor": Criterion(("bn_gate_squared",), bn_taylor),
    "taylor_weight": Criterion(("weight_squared",), taylor_weight),
    "bn_scale": Criterion(("scale",), bn_scale),
    "magnitude": Criterion(("filter_norm",), magnitude),
    "random": Criterion(("uniform",), random),
}

# The expansions behind the squares: E_b[ΔL] with its sign, as predicted for the removal of each unit.
CHANGES: dict[str, Criterion] = {
    "taylor_fo": Criterion(("gate",), lambda gate: -gate),
    "taylor_so": Criterion(("change",), lambda change: change),
    "taylor_so_fisher": Criterion(("fisher", "gate"), lambda fisher, gate: fisher / 2 - gate),
}


def criterion(name: str) -> Criterion:
    """The criterion called ``name``; ValueError with the known names otherwise.

    >>> criterion("taylor_fo").needs
    ('gate_squared',)
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; known are {', '.join(CRITERIA)}")
    return CRITERIA[name]


def change(name: str) -> Criterion:
    """The signed expansion behind criterion ``name``; ValueError with the names that have one otherwise.

    >>> change("taylor_so_fisher").formula(2.0, 3.0)
    -2.0
    """
    if name not in CHANGES:
        raise ValueError(f"criterion {name!r} predicts no signed change; those that do are {', '.join(CHANGES)}")
    return CHANGES[name]
