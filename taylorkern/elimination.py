"""Elimination: which gate of a quadratic costs least to remove, as gates go one after another and the rest make up.

The loss is taken to be ½ dᵀAd, A = H + λI. The gates R that have gone stand at d = -1, and the others K where that is
least, d_K = A_KK⁻¹ H_KR·1. To remove u as well then costs (1 + d_u)² / (2·[A_KK⁻¹]_uu), and moves the rest by
-[A_KK⁻¹]_{·u}·(1 + d_u) / [A_KK⁻¹]_uu: Hassibi and Stork's "Optimal Brain Surgeon" (1993), of gates, not weights.
"""

import torch
from torch import Tensor

# The columns of so many removals are kept apart before one matrix product takes them off the inverse.
_PANEL = 64
# After so many removals, or a quarter of the gates, everything is computed anew from H: rounding never piles up.
_FRESH = 1000


class SingularError(ValueError):
    """H with this damping has no inverse."""


class Elimination:
    """One block of gates, ``matrix`` H [k, k] (float64, symmetric, positive semi-definite) and ``ridge`` λ.

    Removing gates is a pivoted Cholesky factorisation of the inverse: a removal needs one column of it, brought up to
    date, and k·removals multiplications; the rest follows in products of matrices. Raises SingularError where H + λI
    is not positive definite.

    >>> gates = Elimination(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64), ridge=0.0)
    >>> gates.remove(0)
    >>> gates.shift.round(decimals=9).tolist(), round(gates.increase()[1].item(), 9)
    ([-1.0, 0.5], 2.25)
    """

    def __init__(self, matrix: Tensor, ridge: float) -> None:
        self._matrix, self._ridge = matrix, ridge
        self._stays = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
        self.shift = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
        self._rows: Tensor
        self._panel: Tensor
        self._diagonal: Tensor
        self._place: Tensor
        self._filled: int
        self._removed: int
        self._factorise()

    def increase(self) -> Tensor:
        """(1 + d_u)² / (2·[A_KK⁻¹]_uu) for every gate u that stays, NaN for the others, [k]."""
        found = torch.full_like(self.shift, torch.nan)
        found[self._rows] = (1 + self.shift[self._rows]).square() / (2 * self._diagonal)
        return found.where(self._stays, torch.nan)

    def remove(self, gate: int) -> None:
        """Set the gate's d to -1 and move the others to where the loss is least."""
        i = int(self._place[gate])
        panel = self._panel[: self._filled]
        column = torch.addmv(self._inverse[i], panel.T, panel[:, i], alpha=-1)
        pivot = column[i].clone()
        self.shift[self._rows] -= column * ((1 + self.shift[gate]) / pivot)
        self._panel[self._filled] = column / pivot.sqrt()
        self._diagonal -= self._panel[self._filled].square()
        self._filled += 1
        self._removed += 1
        self.shift[gate] = -1
        self._stays[gate] = False
        if self._removed >= min(_FRESH, max(1, len(self._rows) // 4)):
            self._factorise()
        elif self._filled == _PANEL:
            self._inverse.addmm_(self._panel.T, self._panel, alpha=-1)
            self._filled = 0

    def _factorise(self) -> None:
        """The inverse for the gates that stay, and their shift, from H itself."""
        self._inverse = torch.empty(0)  # so that the old one's memory is free for the new one
        rows = self._rows = self._stays.nonzero().flatten()
        self._place = torch.full((len(self._stays),), -1).index_copy_(0, rows.cpu(), torch.arange(len(rows)))
        factor = factorised(self._matrix, rows, self._ridge)
        if len(rows) < len(self._stays):
            gone = (~self._stays).nonzero().flatten()
            pull = self._matrix.index_select(0, gone).index_select(1, rows).sum(0)
            self.shift[rows] = torch.cholesky_solve(pull.unsqueeze(1), factor).squeeze(1)
        self._inverse = torch.cholesky_inverse(factor)
        self._diagonal = self._inverse.diagonal().clone()
        self._panel = self._inverse.new_empty(_PANEL, len(rows))
        self._filled = self._removed = 0  # columns in the panel, removals since this factorisation


def factorised(matrix: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """The lower Cholesky factor of ``matrix`` + ``ridge``·I at ``rows``.

    Raises SingularError where a pivot is not positive, or so small that rounding has made it.
    """
    damped = matrix.index_select(0, rows)
    damped = damped.index_select(1, rows) if len(rows) < len(matrix) else damped
    damped.diagonal().add_(ridge)
    rounding = len(rows) * torch.finfo(damped.dtype).eps * damped.diagonal().max() if len(rows) else 0.0
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) or bool((factor.diagonal().square() <= rounding).any()):
        raise SingularError(
            f"the curvature of {len(rows)} gates is singular with a ridge of {ridge:.3g}; pass a larger damping"
        )
    return factor
