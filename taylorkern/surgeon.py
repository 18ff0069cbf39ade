"""The surgeon: which set of units goes, and how the gates of those that stay make up for it.

H [U, U] is the loss's curvature along all gates at once, E_b[mean_n r rᵀ] with a row r of every sample (``gram.py``),
whole or in blocks. With gates at z = 1 + d the loss changes by about ½ dᵀHd. λ = damping·mean(diag H) is added to its
diagonal: it restrains the shifts of gates that few samples speak about, and lets a matrix of fewer rows than units have
an inverse. A kept gate's z folds into the network's weights (``compensation.py``): making up costs nothing.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .elimination import Elimination, SingularError, factorised
from .gram import Block

__all__ = ["COST_POWER", "DAMPING", "Remaining", "SingularError", "check", "choose", "shift"]

DAMPING = 0.1
# Per whole cost saved, wide layers that everything reads go first, and more at once than H can speak for; regardless
# of it, many cheap units. Measured between: README, "Sets".
COST_POWER = 1 / 3


class Remaining(Protocol):
    """What is left while units go one after the other; see :class:`taylorkern.shrinking.Shrinking`."""

    @property
    def done(self) -> bool: ...

    @property
    def allowed(self) -> Tensor:
        """[U] bool: which units may go next."""

    @property
    def saving(self) -> Tensor:
        """[U] float64: what each removal would save."""

    def remove(self, unit: int) -> None: ...


def choose(blocks: Sequence[Block], remaining: Remaining, damping: float = DAMPING, cost_power: float = 1.0) -> Tensor:
    """The units that go, in that order: each time the one of least predicted increase per cost saved.

    The increase is (1 + d_u)² / (2·[(H + λI)_KK⁻¹]_uu) over the units K still there, d their optimal shift; it is
    divided by what the removal saves, to the power ``cost_power``; ties go by unit index.
    A unit that no row speaks about counts as an increase of λ/2. It ends when ``remaining`` is done or allows no more.

    Returns int64 indices. Raises ValueError for a damping or ``cost_power`` that is negative or no number, an H that is
    not finite, and, as SingularError, an H that is singular in spite of the damping.

    >>> from taylorkern.shrinking import Countdown
    >>> rows = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.3, 1.0]], dtype=torch.float64)
    >>> choose([Block(torch.arange(3), rows.T @ rows)], Countdown(torch.ones(3, dtype=torch.bool), 1)).tolist()
    [1]
    """
    check(damping, cost_power=cost_power)
    ridge = _ridge(blocks, damping)
    eliminations = [Elimination(block.matrix, ridge) for block in blocks]
    units = sum(len(block.units) for block in blocks)
    home = torch.empty(units, dtype=torch.int64)  # the block of each unit
    place = torch.empty(units, dtype=torch.int64)  # its index there
    increase = torch.empty(units, dtype=torch.float64)
    members = [block.units.cpu() for block in blocks]
    for i, (own, elimination) in enumerate(zip(members, eliminations, strict=True)):
        home[own], place[own], increase[own] = i, torch.arange(len(own)), elimination.increase().cpu()
    removed: list[int] = []
    while not remaining.done:
        saving = remaining.saving
        price = torch.where(remaining.allowed & (saving > 0), increase / saving**cost_power, torch.inf)
        unit = int(price.argmin())
        if math.isinf(price[unit]):
            break
        at = int(home[unit])
        eliminations[at].remove(int(place[unit]))
        increase[members[at]] = eliminations[at].increase().cpu()
        remaining.remove(unit)
        removed.append(unit)
    return torch.tensor(removed, dtype=torch.int64)


def shift(
    blocks: Sequence[Block],
    removed: Tensor,
    damping: float = DAMPING,
    bound: float | None = None,
    fixed: Tensor | None = None,
) -> Tensor:
    """d [U] (float64) with which the gates of the other units make up for the ``removed`` ones, whoever chose them.

    It is -1 for the removed, 0 for those in ``fixed`` [U] (bool), and where ½ dᵀ(H + λI)d is least for the rest:
    d_K = (H + λI)_KK⁻¹ H_KR·1, one solution of equations per block. With ``bound`` no gate moves by more: those that
    would are held there, and the rest solved for again until all are within.

    Raises ValueError like :func:`choose`, and for a bound that is not above 0.

    >>> block = Block(torch.arange(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    >>> shift([block], torch.tensor([0]), damping=0.0), shift([block], torch.tensor([0]), damping=0.0, bound=0.25)
    (tensor([-1.0000,  0.5000], dtype=torch.float64), tensor([-1.0000,  0.2500], dtype=torch.float64))
    """
    check(damping, bound)
    ridge = _ridge(blocks, damping)
    units = sum(len(block.units) for block in blocks)
    d = torch.zeros(units, dtype=torch.float64)
    d[removed] = -1
    held = torch.zeros(units, dtype=torch.bool) if fixed is None else fixed.cpu().clone()
    held[removed] = True
    for block in blocks:
        own = block.units.cpu()
        d[own] = _solved(block.matrix, d[own].to(block.matrix.device), ~held[own], ridge, bound).cpu()
    return d


def check(damping: float, bound: float | None = None, cost_power: float = COST_POWER) -> None:
    """Raise ValueError for a damping, a bound or a power of the cost that means nothing."""
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping={damping} must be a number of at least 0: it multiplies the mean of H's diagonal")
    if bound is not None and not bound > 0:
        raise ValueError(f"bound={bound} must be above 0: it is how far a gate may move from 1")
    if not (cost_power >= 0 and math.isfinite(cost_power)):
        raise ValueError(
            f"cost_power={cost_power} must be a number of at least 0: an increase is divided by the cost saved to it"
        )


def _solved(matrix: Tensor, d: Tensor, free: Tensor, ridge: float, bound: float | None) -> Tensor:
    """d [k] with those that are ``free`` where the loss is least, the others as they are."""
    while bool(free.any()) and bool(d[~free].any()):
        rows = free.nonzero().flatten().to(d.device)
        held = (~free).nonzero().flatten().to(d.device)
        pull = matrix.index_select(0, held).index_select(1, rows).T @ d[held]
        factor = factorised(matrix, rows, ridge)
        d[rows] = -torch.cholesky_solve(pull.unsqueeze(1), factor).squeeze(1)
        beyond = d.abs().cpu() > (torch.inf if bound is None else bound)
        beyond &= free
        if not bool(beyond.any()):
            break
        assert bound is not None
        d[beyond.to(d.device)] = d[beyond.to(d.device)].clamp(-bound, bound)
        free = free & ~beyond
    return d


def _ridge(blocks: Sequence[Block], damping: float) -> float:
    """λ: ``damping`` times the mean of H's diagonal, over the units of all blocks. 1 where all of H is nought."""
    check(damping)
    if not all(bool(block.matrix.isfinite().all()) for block in blocks):
        raise ValueError("the curvature over the gates is not finite; was it loaded from a damaged file?")
    units = sum(len(block.units) for block in blocks)
    mean = sum(float(block.matrix.diagonal().sum()) for block in blocks) / max(1, units)
    return damping * mean if mean else 1.0
