"""Cuts tried on stand-ins: widths that code bakes into numbers freeze what they count, with their line told."""

import json
import warnings

import pytest
import torch
from torch import nn

from taylorkern.coupling import couple
from taylorkern.surgery import cut

IMAGE = torch.randn(1, 3, 6, 6)


class Net(nn.Module):
    """Two branches of the same width; ``mixed`` is what happens to the first between its layers."""

    def __init__(self, mixed) -> None:
        super().__init__()
        self.width, self.groups, self.mixed = 8, 2, mixed
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.head_a, self.head_b = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head_a(self.mixed(self, self.a(x))) + self.head_b(self.b(x))


def two_samples(net, x):
    assert x.shape[1] == 8, "a width"
    return x


BAKED = {
    "view": lambda net, x: x.view(x.shape[0], 8, -1).flatten(1).view_as(x),
    "parts": lambda net, x: torch.cat(x.split([4, 4], 1), 1),
    "constant": lambda net, x: x + torch.zeros(8, 1, 1),
    "computed": lambda net, x: x.view(-1, net.width * 36).view(-1, 8, 6, 6),
    "asserted": two_samples,
    "slice": lambda net, x: torch.cat([x[:, :4], x[:, 4:8], x[:, 8:]], 1),
    "expanded": lambda net, x: x * torch.ones(1, 1, 1, 1).expand(1, 8, 1, 1),
}


@pytest.mark.parametrize("case", BAKED)
def test_a_baked_width_freezes_what_it_counts_and_nothing_else(case):
    model = Net(BAKED[case])
    coupling = couple(model, IMAGE)
    assert set(coupling.layers) == {"b"}
    cut(model, coupling, [0, 5], IMAGE)
    assert (model.a.out_channels, model.b.out_channels) == (8, 6)


@pytest.mark.parametrize("case", ["view", "parts", "computed", "slice"])
def test_the_line_that_does_not_follow_is_told(case):
    coupling = couple(Net(BAKED[case]), IMAGE)
    line = f"tests/test_coupling_trial.py:{BAKED[case].__code__.co_firstlineno}".removeprefix("tests/")
    assert any(entry.line == line for entry in coupling.frozen)
    assert line in coupling.report()
    assert line in [entry["line"] for entry in json.loads(coupling.report("json"))["frozen"]]


def test_other_splits_of_the_same_line_are_tried():
    def parts(net, x):
        n, c, h, w = x.shape
        return x.view(n, c // 2, 2, h, w).sum(2).repeat(1, 2, 1, 1)

    coupling = couple(Net(parts), IMAGE)
    assert coupling.axes["a.weight", 0].view(4, 2).tolist() == [
        [u, u] for u in coupling.axes["a.weight", 0][::2].tolist()
    ]
    assert "a" in coupling.layers


def test_branches_of_training_are_tried_too():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8 * 36, 2), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return (self.head(x), self.aux(x.view(-1, 288))) if self.training else self.head(x)

    assert "a" not in couple(Trained(), IMAGE).layers


def test_models_that_do_not_run_on_the_meta_device_are_tried_on_real_tensors():
    def data_dependent(net, x):
        return x * 2 if bool((net.head_b.bias.abs() >= 0).all()) else x.view(-1, 8, 6, 6)

    assert set(couple(Net(data_dependent), IMAGE).layers) == {"a", "b"}


def test_a_trial_leaves_the_model_as_it_was():
    model = Net(BAKED["view"])
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    widths = [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]
    couple(model, IMAGE)
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1]) and p.requires_grad
    assert widths == [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_reports():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coupling = couple(Net(BAKED["view"]), IMAGE)
    told = json.loads(coupling.report("json"))
    assert told["free_units"] == coupling.free_units == 0.5
    assert [unit[0][0] for unit in told["units"]] == ["b"] * 8
    assert {"name": "a", "channels": 8, "free": 0, "gated": False} in told["layers"]
    assert coupling.report().startswith("8 units with 8 gates in 1 layers can be cut; 8 more sets of channels can't")
    with pytest.raises(ValueError, match="'xml' is not one of 'text', 'json'"):
        coupling.report("xml")


def test_an_attribute_that_means_something_else_is_left_alone():
    class Misleading(nn.Module):
        """Its number of heads is also the width of a convolution, which has nothing to do with it."""

        def __init__(self):
            super().__init__()
            self.num_heads = 8
            self.a, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.table = nn.Parameter(torch.randn(16))

        def forward(self, x):
            return self.head(self.a(x).relu() * 1.5) + self.table.view(self.num_heads, 2).sum(0).view(1, 2, 1, 1)

    model = Misleading()
    coupling = couple(model, IMAGE)
    assert len(coupling.units) == 8 and not coupling.attributes
    cut(model, coupling, [3], IMAGE)
    assert (model.num_heads, model.a.out_channels) == (8, 7)
