"""Gates folded in: a cut model equals the dense one with gates at its layers' outputs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taylorkern as tk
from bench.study.networks import NETWORKS
from bench.zoo import build, draw, error, masked, outputs
from taylorkern.compensation import adjustable, folded
from taylorkern.coupling import Coupling, couple
from taylorkern.surgery import cut
from tests.compensated import NOTHING, chain, check_folded, gated, gates, of_the_kept
from tests.fused import needs_kernels, ran  # noqa: F401
from tests.networks import plain, randomised, residual
from tests.test_coupling import Auxiliary, Net, conv
from tests.test_surgery import same, snapshot

IMAGE = torch.randn(2, 2, 8, 8)
DIGIT = torch.randn(2, 1, 8, 8)


def grouped() -> nn.Module:
    """Depthwise with its normalisation, in two groups, and a transposed convolution in two groups."""
    pointwise = [conv(2, 8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)]
    groups = [nn.SiLU(), conv(8, 8, 3, padding=1, groups=4), nn.ReLU(inplace=True), conv(8, 12)]
    transposed = [nn.ConvTranspose2d(12, 8, 2, 2, groups=4), nn.Sigmoid(), conv(8, 4), nn.Flatten()]
    return randomised(nn.Sequential(*pointwise, *groups, *transposed, nn.Linear(4 * 16 * 16, 3)))


def volumes() -> nn.Module:
    layers = [nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 5, 2), nn.Tanh()]
    return randomised(nn.Sequential(*layers, nn.Conv3d(5, 2, 1), nn.Flatten(), nn.Linear(128, 2)))


def signals() -> nn.Module:
    layers = [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ReLU()]
    return randomised(nn.Sequential(*layers, nn.Conv1d(6, 2, 1), nn.Flatten(), nn.Linear(16, 2)))


def tokens() -> nn.Module:
    """[N, T, C] through linear layers: the channels are the last dimension."""
    layers = [nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 2)]
    return nn.Sequential(*layers)


def twice() -> nn.Module:
    """One layer called twice."""

    def apply(net, x):
        x = net.norm(net.conv(net.stem(x))).relu_()
        return net.head(net.norm(net.conv(x)).relu_().mean((2, 3)))

    return randomised(
        Net(apply, stem=conv(2, 6), conv=conv(6, 6, bias=False), norm=nn.BatchNorm2d(6), head=nn.Linear(6, 3))
    )


def inplace() -> nn.Module:
    """An addition into the very output that carries the gate."""

    def apply(net, x):
        x = net.a(x)
        x += 1
        x.mul_(2)
        return net.head(x.relu_().mean((2, 3)))

    return Net(apply, a=conv(2, 6), head=nn.Linear(6, 3))


MODELS = {
    "conv-bn-relu": (lambda: chain(nn.ReLU(), nn.ReLU(inplace=True)), IMAGE),
    "other activations": (lambda: chain(nn.ReLU6(), nn.SiLU(), nn.Sigmoid(), nn.LeakyReLU()), IMAGE),
    "residual": (residual, IMAGE),
    "plain": (plain, IMAGE),
    "grouped": (grouped, IMAGE),
    "tokens": (tokens, torch.randn(2, 3, 5)),
    "vector": (tokens, torch.randn(2, 5)),
    "volumes": (volumes, torch.randn(2, 1, 4, 4, 4)),
    "signals": (signals, torch.randn(2, 2, 8)),
    "twice": (twice, IMAGE),
    "in place": (inplace, IMAGE),
    "auxiliary": (Auxiliary, torch.randn(2, 3, 8, 8)),
    **{name: (lambda make=make: randomised(make()), DIGIT) for name, make in NETWORKS.items()},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_a_cut_with_gates_equals_the_gated_masked_network(name, seed):
    torch.manual_seed(seed)
    make, x = MODELS[name]
    check_folded(make().double(), x.double())


@pytest.mark.parametrize("name", MODELS)
def test_gates_are_folded_in_without_a_cut(name):
    torch.manual_seed(0)
    make, x = MODELS[name]
    check_folded(make().double(), x.double(), [])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"])
def test_torchvision(name):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model, x = build(name, 0)
    coupling = couple(model, x[:1])
    removed = draw(coupling)
    # Near 1: in a deep network random gates would leave only some channels to be seen.
    z = (1 + 0.1 * torch.randn(len(coupling.units), dtype=torch.float64)) * torch.randn(len(coupling.units)).sign()
    assert adjustable(model, coupling).all()
    with masked(model, coupling, removed), gated(model, coupling, of_the_kept(z, removed)):
        expected = outputs(model, x, False)
    cut(model, coupling, removed, x[:1], verify=False, gates=z)
    assert error(expected, outputs(model, x, False)) < 1e-9


def test_torchvision_is_verified():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model, x = build("mobilenet_v2", 1)
    coupling = couple(model, x[:1])
    cut(model, coupling, draw(coupling), x[:1], gates=torch.linspace(-0.5, 1.5, len(coupling.units)))


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_gates_and_any_removed_set(data):
    torch.manual_seed(0)
    model, x = residual(3).double(), IMAGE.double()
    coupling = couple(model, x)
    count = len(coupling.units)
    drawn = data.draw(st.sets(st.integers(0, count - 1), max_size=count // 2))
    removed = torch.tensor(sorted(drawn), dtype=torch.int64)
    for units in coupling.axes.values():
        if not bool(coupling.staying(removed)[units].any()):
            removed = removed[removed != units[0]]
    z = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=count, max_size=count)), dtype=torch.float64)
    with masked(model, coupling, removed), gated(model, coupling, of_the_kept(z, removed)):
        expected = outputs(model, x, False)
    cut(model, coupling, removed, x, gates=z)
    assert error(expected, outputs(model, x, False)) < 1e-9


def test_every_place_of_a_unit_is_folded():
    torch.manual_seed(0)
    model = residual()
    coupling = couple(model, IMAGE)
    unit = next(u for u, found in enumerate(coupling.units) if len(found.places) > 1)
    z = torch.ones(len(coupling.units), dtype=torch.float64)
    z[unit] = -2
    before = copy.deepcopy(model)
    cut(model, coupling, [], IMAGE, gates=z)
    places = coupling.units[unit].places
    assert len(places) > 1
    for layer, channel in places:
        for name in ("weight", "bias"):
            expected = before.get_submodule(layer).get_parameter(name).detach().clone()
            expected[channel] *= -2
            assert torch.equal(model.get_submodule(layer).get_parameter(name), expected)
    layers = {layer for layer, _ in places}
    for name, parameter in before.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ConvTranspose1d(4, 2, 3, groups=2, bias=False),
        nn.ConvTranspose3d(2, 3, 1),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.Conv3d(2, 3, 1, bias=False),
        nn.Linear(3, 5),
        nn.BatchNorm1d(3).eval(),
    ],
)
def test_each_output_channel_is_multiplied_by_its_own_gate(layer):
    """Also within a group, whose channels are no units of their own in a network."""
    layer = copy.deepcopy(layer).double()
    shape = {nn.Linear: (2, 3), nn.BatchNorm1d: (2, 3)}.get(type(layer))
    x = torch.randn(shape or (2, layer.in_channels, *[4] * (layer.weight.dim() - 2)), dtype=torch.float64)
    coupling = Coupling.alone({"0": layer})
    model = nn.Sequential(layer)
    y = model(x).detach()
    z = torch.randn(len(coupling.units), dtype=torch.float64)
    for name, value in folded(model, coupling, NOTHING, z).items():
        model.get_parameter(name).data = value
    torch.testing.assert_close(model(x), y * z.view(-1, *[1] * (y.dim() - 2)), rtol=1e-12, atol=1e-12)


def test_nothing_to_do_changes_nothing():
    model = residual()
    coupling, before = couple(model, IMAGE), snapshot(model)
    assert cut(model, coupling, [], IMAGE, gates=torch.ones(len(coupling.units), dtype=torch.float64)) is coupling
    assert same(before, snapshot(model))


def test_a_parameter_whose_gates_are_one_is_left_alone():
    model = residual()
    coupling = couple(model, IMAGE)
    z = torch.ones(len(coupling.units), dtype=torch.float64)
    z[coupling.layers["3.bn1"][2]] = 0.5
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    assert cut(model, coupling, [], IMAGE, gates=z) is coupling
    changed = {name for name, p in model.named_parameters() if p.data_ptr() != before[name][0]}
    assert changed == {"3.bn1.weight", "3.bn1.bias"}
    assert (model[3].bn1.weight == before["3.bn1.weight"][1]).tolist() == [True, True, False, True, True, True]


def test_gates_of_one_are_the_plain_cut():
    torch.manual_seed(0)
    a = residual()
    b = copy.deepcopy(a)
    coupling = couple(a, IMAGE)
    cut(a, coupling, [0, 7, 9], IMAGE)
    cut(b, coupling, [0, 7, 9], IMAGE, gates=torch.ones(len(coupling.units), dtype=torch.float64))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_gates_may_come_in_any_floating_type_and_need_gradients():
    a, b = (randomised(plain()) for _ in range(2))
    b.load_state_dict(a.state_dict())
    coupling = couple(a, IMAGE)
    z = torch.linspace(-1, 2, len(coupling.units), requires_grad=True)
    cut(a, coupling, [1], IMAGE, gates=z)
    cut(b, coupling, [1], IMAGE, gates=z.detach().double())
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert all(p.grad_fn is None for p in a.parameters())


def test_iterative_cuts_with_gates():
    torch.manual_seed(0)
    model, x = residual().double(), IMAGE.double()
    dense, first = copy.deepcopy(model), couple(model, x)
    coupling, total = first, torch.ones(len(first.units), dtype=torch.float64)
    for _ in range(3):
        removed = torch.tensor([1, len(coupling.units) - 2])
        z = 1 + 0.5 * torch.randn(len(coupling.units), dtype=torch.float64)
        total[coupling.dense] *= z
        coupling = cut(model, coupling, removed, x, gates=z)
    stays = torch.zeros(len(first.units), dtype=torch.bool)
    stays[coupling.dense] = True
    gone = (~stays).nonzero().flatten()
    with masked(dense, first, gone), gated(dense, first, of_the_kept(total, gone)):
        expected = outputs(dense, x, False)
    assert error(expected, outputs(model, x, False)) < 1e-9


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [residual, lambda: chain(nn.ReLU(), nn.SiLU(), nn.LeakyReLU())])
def test_fused_networks(make, layout, ran):  # noqa: F811
    torch.manual_seed(0)
    dense, x = make().double(), IMAGE.double().to(memory_format=layout)
    model = tk.convert(copy.deepcopy(dense).to(memory_format=layout), fuse=True)
    coupling = couple(model, x)
    removed = draw(coupling)
    z = gates(coupling, removed)
    with masked(dense, coupling, removed), gated(dense, coupling, of_the_kept(z, removed)):
        expected = [outputs(dense, x, training) for training in (False, True)]
    cut(model, coupling, removed, x, gates=z)
    for training in (False, True):
        assert error(expected[training], [model.train(training)(x).detach()]) < 1e-9
    assert sum(ran.values()) >= 6


def test_scored_networks():
    model = tk.convert(residual(), fuse=True)
    scores = tk.Scores(model, IMAGE, criteria=("taylor_fo",))
    cut(model, scores.coupling, [0, 8], IMAGE, gates=torch.linspace(-1, 2, len(scores.units)))


@pytest.mark.parametrize("case", ["short", "matrix", "nan", "infinite"])
def test_bad_gates(case):
    model = plain()
    coupling, before = couple(model, IMAGE), snapshot(model)
    ones = torch.ones(len(coupling.units))
    z, message = {
        "short": (ones[1:], rf"shape \({len(ones) - 1},\), but the coupling has {len(ones)} units"),
        "matrix": (ones[None], rf"shape \(1, {len(ones)}\)"),
        "nan": (ones.index_fill(0, torch.tensor(2), torch.nan), r"unit 2 \(0, channel 2\) is nan; it must be finite"),
        "infinite": (ones.index_fill(0, torch.tensor(7), -torch.inf), r"unit 7 \(2, channel 1\) is -inf"),
    }[case]
    with pytest.raises(ValueError, match=message):
        cut(model, coupling, [0], IMAGE, gates=z)
    assert same(before, snapshot(model))


def test_hooks_of_the_user_see_the_same():
    """The gate stands at the layer's own output, in front of what a hook makes of it."""
    model, x = residual().double(), IMAGE.double()
    model[3].bn1.register_forward_hook(lambda module, inputs, output: output.tanh() + 1)
    coupling = couple(model, x)
    cut(model, coupling, [0], x, gates=torch.linspace(-1, 2, len(coupling.units)))
