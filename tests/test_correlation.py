"""Coefficients against values worked out by hand and scipy's own; intervals against what they must contain."""

import math
import statistics
import subprocess
import sys
import warnings

import pytest
import torch
from scipy import stats
from torch import nn

import taylorkern as tk
from taylorkern.correlation import COEFFICIENTS, by_layer, correlations, interval
from tests.networks import residual


def close(found, expected):
    return all(math.isclose(found[name], value, abs_tol=1e-12) for name, value in expected.items())


def test_values_worked_out_by_hand():
    truth = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-3, -2, -1, 6): 14 / √(5·50). One pair of ranks is turned, of six.
    importance = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert close(correlations(truth, importance), {"pearson": 14 / math.sqrt(250), "spearman": 1.0, "kendall": 1.0})
    turned = correlations(truth, torch.tensor([1.0, 3.0, 2.0, 10.0]))
    assert close(turned, {"spearman": 1 - 6 * 2 / (4 * 15), "kendall": (5 - 1) / 6})
    assert close(correlations(truth, -truth), dict.fromkeys(COEFFICIENTS, -1.0))


def test_it_is_scipys_in_float64_whatever_the_dtype():
    torch.manual_seed(0)
    truth, importance = torch.rand(50, dtype=torch.float64).square(), torch.rand(50)
    importance[10:20] = 0  # ties
    found = correlations(truth, importance.requires_grad_())
    x, y = truth.numpy(), importance.detach().double().numpy()
    assert found == {
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "kendall": stats.kendalltau(x, y).statistic,
    }


def test_units_that_can_not_be_judged_are_left_out():
    truth = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0, 8.0, torch.nan])
    importance = torch.tensor([1.0, torch.inf, 2.0, 3.0, torch.nan, -torch.inf, 4.0])
    assert close(correlations(truth, importance), dict.fromkeys(COEFFICIENTS, 1.0))


@pytest.mark.parametrize(
    "truth, importance",
    [
        ([], []),
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, math.inf]),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]),
        ([1.0, 2.0, 3.0, 9.0], [5.0, 5.0, 5.0, math.nan]),
    ],
)
def test_too_little_to_correlate_is_nan_without_a_warning(truth, importance):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlations(torch.tensor(truth), torch.tensor(importance))
    assert set(found) == set(COEFFICIENTS)
    assert all(math.isnan(value) for value in found.values())


def test_nearly_constant_sides_warn_nobody():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        truth = torch.tensor([1, 1 + 2e-16, 1 + 1e-15, 1], dtype=torch.float64)
        assert close(correlations(truth, truth), {"spearman": 1.0, "kendall": 1.0})
    assert not caught


def test_shapes_that_differ_are_refused():
    for truth, importance in ((torch.ones(3), torch.ones(4)), (torch.ones(2, 2), torch.ones(2, 2))):
        with pytest.raises(ValueError, match=r"must both be \[U\]"):
            correlations(truth, importance)


def test_the_interval_is_the_bootstraps():
    values = [0.2, 0.4, 0.5, 0.9, 1.0]
    low, high = interval(values)
    reference = stats.bootstrap(
        (values,), statistics.fmean, n_resamples=20_000, method="percentile", vectorized=False, random_state=1
    ).confidence_interval
    assert abs(low - reference.low) < 0.02 and abs(high - reference.high) < 0.02
    assert min(values) < low < statistics.fmean(values) < high < max(values)
    assert interval(values) == (low, high)
    assert interval(values, draws=20) != interval(values, draws=20, seed=1)
    narrow = interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_the_interval_holds_the_mean_about_as_often_as_it_says():
    """Of 400 samples of 30: 0.95 less a known shortfall of the percentile method; four standard errors either way."""
    torch.manual_seed(0)
    samples = torch.randn(400, 30, dtype=torch.float64).tolist()
    held = sum(low <= 0 <= high for low, high in (interval(sample, draws=1000) for sample in samples)) / 400
    assert 0.93 - 4 * 0.0128 < held < 0.95 + 4 * 0.011


def test_one_network_says_nothing_on_the_spread():
    for values in ([], [0.5], [0.5, math.nan], [math.nan, math.nan]):
        assert all(math.isnan(bound) for bound in interval(values))
    assert interval([0.5, math.nan, 0.7]) == interval([0.5, 0.7])
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_units_by_layer_each_once():
    model = residual().eval()
    coupling = tk.couple(model, torch.randn(1, 2, 8, 8))
    layers = by_layer(coupling)
    assert list(layers) == list(coupling.layers)
    for layer, units in layers.items():
        expected = [u for u, unit in enumerate(coupling.units) if any(name == layer for name, _ in unit.places)]
        assert units.tolist() == expected
    assert sum(len(units) for units in layers.values()) > len(coupling.units)  # linked ones are in several


def test_a_unit_with_two_places_in_a_layer_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            first, second = self.conv(x).chunk(2, 1)
            return self.head(first + second).mean((2, 3))

    coupling = tk.couple(Twice().eval(), torch.randn(1, 1, 4, 4))
    assert {layer: units.tolist() for layer, units in by_layer(coupling).items()} == {"conv": [0, 1]}


def test_importing_the_package_does_not_import_scipy():
    code = "import sys, taylorkern, taylorkern.cli; print([m for m in sys.modules if m.split('.')[0] == 'scipy'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
