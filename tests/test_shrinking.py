"""A shrinking network against the meter and the rule of widths, asked anew after every removal."""

import pytest
import torch
from torch import nn

import taylorkern as tk
from bench.study.networks import Dense
from taylorkern.budget import MEASURES, Meter, widths
from taylorkern.demo.network import DigitsNet
from taylorkern.shrinking import Shrinking


def flattening():
    """A unit of the convolution stands 16 times in the linear layer's inputs."""
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 9), nn.ReLU(), nn.Linear(9, 3))


NETWORKS = {"residual": lambda: DigitsNet((6, 8, 10), 1), "dense": Dense, "flattening": flattening}


@pytest.fixture(params=NETWORKS)
def coupled(request):
    torch.manual_seed(0)
    model = NETWORKS[request.param]()
    return model, tk.couple(model, torch.rand(1, 1, 8, 8))


def allowed_one_by_one(coupling, kept, least):
    """Whether each unit may go by trying it: every width keeps ``least`` of its indices."""
    found = torch.zeros(len(kept), dtype=torch.bool)
    for unit in kept.nonzero().flatten().tolist():
        without = kept.clone()
        without[unit] = False
        stays = torch.cat([without, torch.ones(1, dtype=torch.bool)])
        found[unit] = all(int(stays[v].sum()) >= min(least, len(v)) for v in widths(coupling))
    return found


@pytest.mark.parametrize("of", MEASURES)
@pytest.mark.parametrize("least", [1, 3])
def test_costs_savings_and_widths_are_those_of_the_network_as_it_is(coupled, of, least):
    model, coupling = coupled
    meter, units = Meter(model, coupling, of), len(coupling.units)
    shrinking = Shrinking(coupling, meter, 0.0, min_channels=least)
    kept = torch.ones(units, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    while bool(shrinking.allowed.any()):
        unit = int(torch.multinomial(shrinking.allowed.double(), 1, generator=generator))
        if int(kept.sum()) % 5 == 0 or int(shrinking.allowed.sum()) < 5:  # it takes a while
            assert torch.equal(shrinking.allowed, allowed_one_by_one(coupling, kept, least))
        before, saving = meter(kept), float(shrinking.saving[unit])
        kept[unit] = False
        shrinking.remove(unit)
        # To first order: a layer that loses inputs and outputs with one unit saves a little less than both together.
        assert 0.5 * saving - 1e-9 <= before - meter(kept) <= saving * (1 + 1e-9)
        assert shrinking._cost == meter(kept)


def test_channels_save_one_each(coupled):
    model, coupling = coupled
    saving = Shrinking(coupling, Meter(model, coupling, "channels"), 0.0).saving
    assert torch.allclose(saving, torch.ones_like(saving), rtol=1e-12)


def test_it_is_done_at_the_goal_or_after_as_many_as_were_allowed(coupled):
    model, coupling = coupled
    meter = Meter(model, coupling, "flops")
    shrinking = Shrinking(coupling, meter, 0.8 * meter.total, most=3)
    for _ in range(3):
        assert not shrinking.done
        shrinking.remove(int(shrinking.allowed.nonzero()[-1]))
    assert shrinking.done
    freely, kept = Shrinking(coupling, meter, 0.8 * meter.total), torch.ones(len(coupling.units), dtype=torch.bool)
    while not freely.done:
        assert meter(kept) > 0.8 * meter.total
        unit = int(freely.allowed.nonzero()[-1])
        kept[unit] = False
        freely.remove(unit)
    assert meter(kept) <= 0.8 * meter.total
