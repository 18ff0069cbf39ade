"""Gates folded in: a cut model equals the dense one with gates at its layers' outputs, or nothing has changed."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import taylorkern as tk
from bench.study.networks import NETWORKS
from bench.zoo import build, draw, error, masked, outputs
from taylorkern import surgery
from taylorkern.compensation import adjustable, folded, rounded
from taylorkern.coupling import Coupling, couple
from taylorkern.surgery import SurgeryError, cut
from tests.fused import needs_kernels, ran  # noqa: F401
from tests.networks import plain, randomised, residual
from tests.test_coupling import Auxiliary, Net, conv
from tests.test_surgery import OPTIMIZERS, same, snapshot, step

IMAGE = torch.randn(2, 2, 8, 8)
DIGIT = torch.randn(2, 1, 8, 8)


@contextmanager
def gated(model: nn.Module, coupling, z: Tensor):
    """Within, every place of unit u is multiplied by z[u] in a copy of its layer's output."""
    places: dict[str, list[tuple[int, int]]] = {}
    for u, unit in enumerate(coupling.units):
        for layer, channel in unit.places:
            places.setdefault(layer, []).append((channel, u))

    def multiplying(layer: str):
        def multiply(module, inputs, output):
            output = output.clone()
            for channel, unit in places[layer]:
                where = (..., channel) if isinstance(module, nn.Linear) else (slice(None), channel)
                output[where] *= z[unit].to(output.dtype)
            return output

        return multiply

    hooks = [model.get_submodule(layer).register_forward_hook(multiplying(layer)) for layer in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gates(coupling, removed: Tensor) -> Tensor:
    """Some negative, none near 1; NaN for the units that go, where nobody may look."""
    return (0.4 + torch.randn(len(coupling.units), dtype=torch.float64)).index_fill(0, removed, torch.nan)


def of_the_kept(z: Tensor, removed: Tensor) -> Tensor:
    return z.index_fill(0, removed, 1)


def check_folded(model: nn.Module, x: Tensor, removed=None) -> None:
    """Cut with gates and compare, in both modes, with gates and masks that surgery does not know of."""
    coupling = couple(model, x)
    removed = draw(coupling) if removed is None else torch.tensor(removed, dtype=torch.int64)
    z = gates(coupling, removed)
    with masked(model, coupling, removed), gated(model, coupling, of_the_kept(z, removed)):
        expected = [outputs(model, x, training) for training in (False, True)]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    after = cut(model, coupling, removed, x, gates=z)
    for training in (False, True):
        assert error(expected[training], outputs(model, x, training)) < 1e-9
    assert len(after.units) == len(coupling.units) - len(removed)
    for name, buffer in model.named_buffers():
        keep = coupling.staying(removed)[coupling.axes[name, 0]] if (name, 0) in coupling.axes else ...
        assert torch.equal(buffer, buffers[name][keep])


def chain(*activations: nn.Module, width: int = 6) -> nn.Module:
    layers: list[nn.Module] = []
    for i, activation in enumerate(activations):
        layers += [conv(width if i else 2, width, 3, padding=1), nn.BatchNorm2d(width), activation]
    return randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 3)))


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


NOTHING = torch.zeros(0, dtype=torch.int64)


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


def test_identity_dtype_layout_flags_and_gradients_stay():
    model = residual().to(memory_format=torch.channels_last).train()
    model[0].weight.requires_grad_(False)
    model[3].bn1.weight.requires_grad_(False)
    model(IMAGE).sum().backward()
    plainly = copy.deepcopy(model)
    before = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
    for p, q in zip(model.parameters(), plainly.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    coupling = couple(model, IMAGE)
    z = torch.linspace(-1, 2, len(coupling.units))
    cut(plainly, coupling, [0, 1, 7], IMAGE)
    cut(model, coupling, [0, 1, 7], IMAGE, gates=z)
    for p, (old, requires_grad, dtype), q in zip(model.parameters(), before, plainly.parameters(), strict=True):
        assert p is old
        assert (p.requires_grad, p.dtype, p.stride()) == (requires_grad, dtype, q.stride())
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    for p, q in zip(model.buffers(), plainly.buffers(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kernel", [1, 3])
def test_scaled_filters_keep_their_memory_format(kernel):
    layers = [conv(4, 4, kernel), nn.ReLU(), nn.ConvTranspose2d(4, 6, kernel), nn.ReLU(), conv(6, 2, kernel)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    x = torch.randn(2, 4, 8, 8)
    coupling = couple(model, x)
    grads = [torch.randn_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    cut(model, coupling, [], x, gates=torch.linspace(-1, 2, len(coupling.units)))
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype):
    """Verified at 1e-9 all the same: no rounding stands in the way of seeing a wrong channel."""
    torch.manual_seed(0)
    model, x = residual().to(dtype), IMAGE.to(dtype)
    wide = copy.deepcopy(model).double()
    coupling = couple(model, x)
    z = 0.4 + torch.randn(len(coupling.units), dtype=torch.float64)
    cut(model, coupling, [0, 8], x, gates=z)
    cut(wide, coupling, [0, 8], x.double(), gates=z)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q.to(dtype))


def halved(net, x):
    return net.head(net.conv(x.bfloat16()).relu().mean((2, 3)))


def test_networks_bound_to_half_precision_are_verified_in_it():
    torch.manual_seed(0)
    model = Net(halved, conv=conv(2, 64), head=nn.Linear(64, 2)).bfloat16()
    coupling = couple(model, IMAGE)
    with pytest.warns(UserWarning, match="in its own precision"):
        cut(model, coupling, range(0, 64, 3), IMAGE, gates=torch.linspace(-1, 2, 64))
    assert model.head.in_features == 42


def test_a_gate_that_overflows_is_refused():
    model = plain()
    coupling = couple(model, IMAGE)
    before = snapshot(model.half())
    z = torch.ones(len(coupling.units), dtype=torch.float64)
    z[0] = 1e9
    with pytest.raises(ValueError, match=r"0\.weight overflows torch\.float16"):
        cut(model, coupling, [1], IMAGE.half(), gates=z)
    assert same(before, snapshot(model))


def test_gates_that_overflow_on_the_way_are_named():
    model = plain().double()
    coupling, before = couple(model, IMAGE.double()), snapshot(model)
    z = torch.full((len(coupling.units),), 1e200, dtype=torch.float64)
    with pytest.raises(
        SurgeryError, match=r"before any cut, with these gates, the network computes non-finite numbers"
    ):
        cut(model, coupling, [0], IMAGE.double(), gates=z)
    assert same(before, snapshot(model))


def test_rounding_keeps_what_was_not_finite():
    weight = torch.tensor([torch.inf, 1.0, torch.nan])
    assert torch.equal(rounded("w", weight, weight.double()).isfinite(), weight.isfinite())


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


def trained(name: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = residual()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, IMAGE, torch.tensor([0, 1]))
    return model, optimizer


@pytest.mark.parametrize("removed", [[0, 8], []])
def test_a_failure_anywhere_in_the_swap_leaves_everything(removed, monkeypatch):
    model, optimizer = trained()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    z, edit = torch.linspace(-1, 2, len(coupling.units)), surgery._Edit
    count = failing = 0

    def counting(do, undo):
        def failing_do():
            nonlocal count
            count += 1
            do()
            if count == failing:
                raise MemoryError("injected")

        return edit(failing_do, undo)

    monkeypatch.setattr(surgery, "_Edit", counting)
    for failing in itertools.count(1):
        count = 0
        try:
            cut(model, coupling, removed, IMAGE, [optimizer], verify=failing < 3, gates=z)
        except MemoryError:
            assert same(before, snapshot(model, optimizer))
        else:
            break
    assert failing > (20 if removed else 10)


@pytest.mark.parametrize("where", ["rounded", "folded", "check", "_sliced", "_state_edits"])
def test_a_failure_before_the_swap_leaves_everything(where, monkeypatch):
    model, optimizer = trained()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    calls, own = [], getattr(surgery, where)

    def failing(*arguments):
        calls.append(where)
        if len(calls) == (5 if where in ("rounded", "_sliced") else 1):
            raise MemoryError("injected")
        return own(*arguments)

    monkeypatch.setattr(surgery, where, failing)
    with pytest.raises(MemoryError, match="injected"):
        cut(model, coupling, [0, 8], IMAGE, [optimizer], gates=torch.linspace(-1, 2, len(coupling.units)))
    assert same(before, snapshot(model, optimizer))


def test_a_wrong_folding_is_refused(monkeypatch):
    def without_bias(*arguments):
        return {name: t for name, t in folded(*arguments).items() if not name.endswith("bias")}

    monkeypatch.setattr(surgery, "folded", without_bias)
    model, optimizer = trained()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    for removed, lost in (([], "refused: with the gates"), ([0], "refused: without unit 0 .* and 0 more and with the")):
        with pytest.raises(SurgeryError, match=f"{lost}.*dense one with these gates at"):
            cut(model, coupling, removed, IMAGE, [optimizer], gates=torch.linspace(-1, 2, len(coupling.units)))
        assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("removed", [[0, 7], []])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimiser_goes_on(name, removed):
    """With the state of before, cut: the next step is the one of a thin model with these weights and this state."""
    model, optimizer = trained(name)
    coupling = couple(model, IMAGE)
    plainly, twin = copy.deepcopy((model, optimizer))
    z = torch.linspace(0.5, 1.5, len(coupling.units))
    parameters = list(model.parameters())
    cut(plainly, coupling, removed, IMAGE, [twin])
    cut(model, coupling, removed, IMAGE, [optimizer], gates=z)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for p, q in zip(model.parameters(), plainly.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[q][key]))
    plainly.load_state_dict(model.state_dict())
    for _ in range(2):
        a, b = (step(m, o, IMAGE, torch.tensor([0, 1])) for m, o in ((model, optimizer), (plainly, twin)))
        assert torch.equal(a, b)


def test_an_optimiser_whose_state_cannot_be_cut_does_not_stop_folding():
    model, optimizer = trained("sgd")
    optimizer.state[model[0].weight]["factor"] = torch.zeros(6)
    coupling = couple(model, IMAGE)
    z = torch.linspace(0.5, 1.5, len(coupling.units))
    cut(model, coupling, [], IMAGE, [optimizer], gates=z)
    with pytest.raises(SurgeryError, match="'factor'"):
        cut(model, coupling, [0], IMAGE, [optimizer], gates=z)


def test_hooks_of_the_user_see_the_same():
    """The gate stands at the layer's own output, in front of what a hook makes of it."""
    model, x = residual().double(), IMAGE.double()
    model[3].bn1.register_forward_hook(lambda module, inputs, output: output.tanh() + 1)
    coupling = couple(model, x)
    cut(model, coupling, [0], x, gates=torch.linspace(-1, 2, len(coupling.units)))
