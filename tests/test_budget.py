"""Budgets: predicted cost equals the cut network's, selections meet targets and spare what must stay."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import taylorkern as tk
from taylorkern import budget
from taylorkern.surgery import cut
from tests.networks import plain, residual

X = torch.ones(1, 2, 8, 8)


def measured(model, of, coupling):
    if of == "channels":
        return len(coupling.units)
    if of == "params":
        return sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops()


@pytest.mark.parametrize("of", budget.MEASURES)
@pytest.mark.parametrize("build", [residual, plain])
def test_the_meter_foretells_the_cut_networks_cost(build, of):
    torch.manual_seed(0)
    model = build().eval()
    coupling = tk.couple(model, X)
    meter = budget.Meter(model, coupling, of)
    assert meter.total == measured(model, of, coupling)
    for seed in range(3):
        removed = torch.randperm(len(coupling.units), generator=torch.Generator().manual_seed(seed))[:3]
        kept = torch.ones(len(coupling.units), dtype=torch.bool)
        kept[removed] = False
        foretold = meter(kept)
        coupling = cut(model, coupling, removed, X)
        meter = budget.Meter(model, coupling, of)
        assert foretold == pytest.approx(measured(model, of, coupling), rel=1e-9)
        assert meter.total == pytest.approx(foretold, rel=1e-9)


def test_every_layer_keeps_its_most_important_channels():
    coupling = tk.couple(residual(), X)
    importance = torch.rand(len(coupling.units), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = budget.removable(importance, coupling, 2)
    assert torch.equal(importance[order], importance[order].sort().values)
    stays = torch.ones(len(importance), dtype=torch.bool)
    stays[order] = False
    for vector in coupling.layers.values():
        assert torch.equal(stays[vector].nonzero().flatten(), importance[vector].topk(2).indices.sort().values)


def test_infinitely_important_units_stay():
    coupling = tk.couple(residual(), X)
    importance = torch.full((len(coupling.units),), torch.inf)
    importance[3] = 1.0
    assert budget.removable(importance, coupling, 1).tolist() == [3]


def test_the_lowest_importance_there_is_goes_first():
    coupling = tk.couple(residual(), X)
    importance = torch.arange(float(len(coupling.units)))
    importance[7] = -torch.inf
    assert int(budget.removable(importance, coupling, 1)[0]) == 7


def test_the_fewest_units_that_meet_the_goal_go():
    model = residual()
    coupling = tk.couple(model, X)
    meter = budget.Meter(model, coupling, "flops")
    order = budget.removable(torch.arange(float(len(coupling.units))), coupling, 1)
    chosen = budget.select(order, len(coupling.units), meter, 0.6 * meter.total)

    def left(count):
        kept = torch.ones(len(coupling.units), dtype=torch.bool)
        kept[order[:count]] = False
        return meter(kept)

    assert left(len(chosen)) <= 0.6 * meter.total < left(len(chosen) - 1)
    assert len(budget.select(order, len(coupling.units), meter, 0.6 * meter.total, most=2)) == 2


def test_an_unknown_measure_is_named():
    model = residual()
    with pytest.raises(ValueError, match="of='bytes'"):
        budget.Meter(model, tk.couple(model, X), "bytes")
