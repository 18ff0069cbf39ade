"""What a gate can be folded into: weights of two layers, computed ones, none at all."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import taylorkern as tk
from bench.zoo import error, masked, outputs
from taylorkern.compensation import adjustable, folded
from taylorkern.coupling import couple
from taylorkern.surgery import SurgeryError, cut
from tests.compensated import NOTHING, chain, check_folded, gated, of_the_kept
from tests.networks import plain
from tests.test_coupling import Net, conv
from tests.test_surgery import same, snapshot

IMAGE = torch.randn(2, 2, 8, 8)


def tied(apply=None) -> Net:
    net = Net(
        apply or (lambda net, x: net.head(net.b(net.a(net.stem(x)).relu()).relu())),
        stem=conv(2, 4),
        a=conv(4, 4),
        b=conv(4, 4),
        head=conv(4, 2),
    )
    net.b.weight = net.a.weight
    return net


def test_tied_weights_are_scaled_once():
    torch.manual_seed(0)
    net, x = tied().double(), IMAGE.double()
    coupling = couple(net, x)
    assert {layer for layer, _ in coupling.units[0].places} >= {"a", "b"}
    weight = net.a.weight.detach().clone()
    z = torch.tensor([2.0, 3.0, -1.0, 0.5], dtype=torch.float64)
    with gated(net, coupling, z):
        expected = outputs(net, x, False)
    cut(net, coupling, [], x, gates=z)
    assert net.b.weight is net.a.weight
    assert torch.equal(net.a.weight, weight * z.view(-1, 1, 1, 1))
    assert error(expected, outputs(net, x, False)) < 1e-9


def normalised_after_one(net, x):
    return net.head(net.norm(net.b(net.a(net.stem(x)).relu())).relu())


def test_tied_weights_that_would_need_different_factors_are_refused_by_name():
    net = tied(normalised_after_one)
    net.norm = nn.BatchNorm2d(4)
    coupling, before = couple(net, IMAGE), snapshot(net)
    assert not adjustable(net, coupling).any()
    z = torch.ones(4, dtype=torch.float64)
    cut(net, coupling, [], IMAGE, gates=z)
    z[2] = 0.5
    with pytest.raises(ValueError, match=r"unit 2 \(.*a\.weight and b\.weight are one parameter.*different factors"):
        cut(net, coupling, [], IMAGE, gates=z)
    assert same(before, snapshot(net))
    cut(net, coupling, [2], IMAGE, gates=z)  # it goes: nothing is to be folded


def test_a_weight_used_outside_its_layer_is_found_by_verification():
    def apply(net, x):
        return net.head((net.conv(x) + F.conv2d(x, net.conv.weight)).relu().mean((2, 3)))

    net = Net(apply, conv=conv(2, 4), head=nn.Linear(4, 2))
    coupling, before = couple(net, IMAGE), snapshot(net)
    z = torch.full((4,), 0.5, dtype=torch.float64)
    with pytest.raises(SurgeryError, match="with the gates folded into the weights, the network would differ from the"):
        cut(net, coupling, [], IMAGE, gates=z)
    assert same(before, snapshot(net))


class Own(tk.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 3


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def parametrised(layer: nn.Module, name: str) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    return layer


def in_a_buffer() -> nn.Module:
    layer = conv(4, 4)
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


WITHOUT_PRODUCER = {
    "affine=False": (lambda: nn.BatchNorm2d(4, affine=False), "layer is a BatchNorm2d without a weight"),
    "own forward": (lambda: Own(4, 4, 1), "layer is a Own, with a forward of its own"),
    "weight": (lambda: parametrised(tk.Conv2d(4, 4, 1), "weight"), "layer has a weight that is no parameter"),
    "γ": (lambda: parametrised(tk.BatchNorm2d(4), "weight"), "layer has a weight that is no parameter"),
    "bias": (lambda: parametrised(tk.Conv2d(4, 4, 1), "bias"), "layer has a bias that is no parameter"),
    "buffer": (in_a_buffer, "layer has a weight that is no parameter"),
}


@pytest.mark.parametrize("case", WITHOUT_PRODUCER)
def test_places_without_a_producer_stay_at_one(case):
    make, message = WITHOUT_PRODUCER[case]
    net = Net(
        lambda net, x: net.head(net.layer(net.conv(x).relu()).sigmoid().mean((2, 3))),
        conv=conv(2, 4),
        layer=make(),
        head=nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
    )
    coupling = couple(net, IMAGE)
    able, stuck = adjustable(net, coupling), coupling.layers["layer"]
    assert not able[stuck].any()
    assert able[coupling.layers["head.0"]].all()
    unit = int(stuck[0])
    z, before = torch.where(able, 0.5, 1.0), snapshot(net)
    z[unit] = 2
    with pytest.raises(ValueError, match=rf"unit {unit} \(.*{message}.*leave it at 1"):
        cut(net, coupling, [], IMAGE, gates=z)
    assert same(before, snapshot(net))
    check_gates(
        net.double(), coupling, IMAGE.double(), z.index_fill(0, torch.tensor(unit), 1).double(), [int(stuck[1])]
    )


def check_gates(model: nn.Module, coupling, x: Tensor, z: Tensor, removed: list[int]) -> None:
    gone = torch.tensor(removed)
    with masked(model, coupling, gone), gated(model, coupling, of_the_kept(z, gone)):
        expected = outputs(model, x, False)
    cut(model, coupling, removed, x, gates=z)
    assert error(expected, outputs(model, x, False)) < 1e-9


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("norm", [old_weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm])
def test_normed_weights_are_not_adjustable(norm):
    """Where their channels are units at all."""
    model = nn.Sequential(conv(2, 4), nn.ReLU(), norm(tk.Conv2d(4, 4, 1)), nn.ReLU(), conv(4, 2))
    coupling = couple(model, IMAGE)
    stuck = coupling.layers.get("2", NOTHING)
    assert not adjustable(model, coupling)[stuck[stuck >= 0]].any()


def test_weights_of_integers_are_not_adjustable():
    model = plain()
    coupling = couple(model, IMAGE)
    model[0].weight = nn.Parameter(torch.ones(6, 2, 3, 3, dtype=torch.int8), requires_grad=False)
    assert not adjustable(model, coupling)[coupling.layers["0"]].any()
    with pytest.raises(ValueError, match=r"0 has a weight of torch\.int8"):
        folded(model, coupling, NOTHING, torch.full((len(coupling.units),), 2.0))


def test_a_normalisation_without_a_bias_is_folded():
    torch.manual_seed(0)
    model, x = chain(nn.ReLU(), nn.ReLU()).double(), IMAGE.double()
    model[1].bias = None
    check_folded(model, x)
