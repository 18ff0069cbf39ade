"""Shares of outputs: the mean of abs(a·dL/da) of each channel, by unit and layer."""

import pytest
import torch

from taylorkern.backends import native
from taylorkern.coupling import Coupling
from taylorkern.outputs import OutputShares
from tests.cases import distance, normal

CPU = torch.device("cpu")
UNITS = {"a": torch.tensor([0, 2, 0]), "b": torch.tensor([-1, 2])}


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def by(request, monkeypatch):
    """Who folds."""
    if request.param == "torch":
        monkeypatch.setattr(native, "folds", lambda pieces: False)


def coupling(units=UNITS, count=3):
    return Coupling([None] * count, {}, set(), set(), units, units, [], [], torch.arange(count))


def by_hand(arrived, units=UNITS, count=3):
    shares = torch.zeros(count, len(units), dtype=torch.float64)
    for i, (layer, of) in enumerate(units.items()):
        for product in arrived.get(layer, []):
            for channel, unit in enumerate(of.tolist()):
                if unit >= 0:
                    shares[unit, i] += product[:, channel].double().abs().mean()
    return shares


@pytest.mark.parametrize("layers", ["a", "b", "ab"])
@pytest.mark.parametrize("times", [1, 3])
def test_every_run_of_a_layer_counts(layers, times):
    """A layer that runs with several batch sizes in a step has a product for each."""
    widths = {"a": (3, 5, 4), "b": (2, 7)}
    arrived = {layer: [normal((2 + i, *widths[layer]), i) for i in range(times)] for layer in layers}
    if layers == "ab":
        arrived["b"] = arrived["b"][:1]
    assert distance(OutputShares(["a", "b"])(arrived, coupling(), CPU), by_hand(arrived)) < 1e-6


def test_nothing_arrived():
    assert torch.equal(OutputShares(["a", "b"])({}, coupling(), CPU), torch.zeros(3, 2, dtype=torch.float64))


def test_a_cut_changes_the_units():
    shares = OutputShares(["a", "b"])
    arrived = {"a": [normal((2, 3, 4), 1)], "b": [normal((2, 2), 2)]}
    shares(arrived, coupling(), CPU)
    after = {"a": torch.tensor([0, 0, 1]), "b": torch.tensor([1, 1])}
    assert distance(shares(arrived, coupling(after, 2), CPU), by_hand(arrived, after, 2)) < 1e-6
