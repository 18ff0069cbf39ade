"""How well an importance foretells what was measured: coefficients, and how far they vary from network to network."""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .coupling import Coupling

COEFFICIENTS: dict[str, Callable] = {
    "pearson": stats.pearsonr,
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
}
FEWEST = 3  # two points lie on a line whatever they are


def correlations(truth: Tensor, importance: Tensor) -> dict[str, float]:
    """Each of ``COEFFICIENTS`` between ``importance`` [U] and the measured (ΔL)² ``truth`` [U].

    Units for which either is not finite are left out: a criterion that can't judge a unit says so by inf. A coefficient
    of fewer than three units, or with a side that is constant, is nan.

    Raises ValueError where the two are not vectors of one length.

    >>> correlations(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 40.0]))
    {'pearson': 1.0, 'spearman': 1.0, 'kendall': 1.0}
    """
    if truth.dim() != 1 or truth.shape != importance.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and importance {tuple(importance.shape)} must both be [U]")
    both = torch.stack([truth.detach().double().cpu(), importance.detach().double().cpu()])
    x, y = both[:, both.isfinite().all(0)].numpy()
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(COEFFICIENTS, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)  # nearly constant: the coefficient says it all
        return {name: float(coefficient(x, y)[0]) for name, coefficient in COEFFICIENTS.items()}


def interval(values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one per seed: (low, high) at confidence ``level``.

    nan values are ignored. Fewer than two values give (nan, nan): one network says nothing about the spread.

    >>> low, high = interval([0.8, 0.9, 1.0])
    >>> 0.8 <= low < 0.9 < high <= 1.0
    True
    """
    known = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(known) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(0, len(known), (draws, len(known)))
    low, high = np.quantile(known[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def by_layer(coupling: Coupling) -> dict[str, Tensor]:
    """Layer on the frontier → indices of the units that have a place in it, ascending, each once.

    A unit of several layers is found in each of them.
    """
    return {layer: units[units >= 0].unique() for layer, units in coupling.layers.items()}
