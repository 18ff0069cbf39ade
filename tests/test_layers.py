"""Gated layers: s against float64 per-sample gates, drop-in behaviour, conversion."""

import copy
import pickle

import pytest
import torch
from torch import nn

import taylorkern as tk
from tests.cases import LAYOUTS, distance, in_layout, normal
from tests.fused import CALLERS
from tests.fused import caller as caller

# A layer's constructor and an input shape it takes; odd sizes, N=1, C=1, HW=1, grouped, strided, unpadded, 1d to 3d.
LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 7, 3), (2, 3, 9, 5)),
    "conv without bias": (lambda: nn.Conv2d(5, 16, 3, stride=2, padding=1, bias=False), (3, 5, 8, 8)),
    "conv to one channel": (lambda: nn.Conv2d(4, 1, 1), (2, 4, 3, 3)),
    "conv of one sample": (lambda: nn.Conv2d(4, 9, 3), (1, 4, 7, 7)),
    "conv to one pixel": (lambda: nn.Conv2d(4, 9, 3), (3, 4, 3, 3)),
    "grouped conv": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 5, 5)),
    "reflecting conv": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 5), (2, 3, 17)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 3), (2, 2, 5, 4, 6)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 7)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(3, 5, 2, stride=2, output_padding=1), (2, 3, 3, 4, 2)),
    "linear": (lambda: nn.Linear(10, 7), (5, 10)),
    "linear over tokens": (lambda: nn.Linear(10, 7), (3, 6, 10)),
    "linear over a grid": (lambda: nn.Linear(4, 5), (2, 3, 6, 4)),
    "bn": (lambda: nn.BatchNorm2d(7), (3, 7, 5, 9)),
    "bn of one channel": (lambda: nn.BatchNorm2d(1), (2, 1, 3, 3)),
    "bn of one sample": (lambda: nn.BatchNorm2d(9), (1, 9, 6, 7)),
    "bn of one pixel": (lambda: nn.BatchNorm2d(33), (4, 33, 1, 1)),
    "bn without affine": (lambda: nn.BatchNorm2d(6, affine=False), (3, 6, 4, 4)),
    "bn1d": (lambda: nn.BatchNorm1d(11), (6, 11)),
    "bn1d over a sequence": (lambda: nn.BatchNorm1d(11), (4, 11, 9)),
    "bn3d": (lambda: nn.BatchNorm3d(5), (2, 5, 3, 4, 2)),
}
# Batch normalisations are called from C++ and from Python, the others from Python always.
CALLED = [(name, caller) for name in LAYERS for caller in CALLERS if "bn" in name or caller == "Python"]
over_layers = pytest.mark.parametrize(("name", "caller"), CALLED, indirect=["caller"])


def build(name):
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    layer = make()
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    if getattr(layer, "weight", None) is not None and isinstance(layer, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer, shape


def channel_dim(layer):
    return -1 if isinstance(layer, nn.Linear) else 1


def explicit(layer, x, dy, after=None):
    """Gradient of a gate tensor multiplied in, per sample and channel, by plain autograd in x's dtype."""
    y = layer(x)
    dim = channel_dim(layer) % y.dim()
    shape = [n if d in (0, dim) else 1 for d, n in enumerate(y.shape)]
    z = torch.ones(shape, dtype=y.dtype, requires_grad=True)
    out = y * z
    out = out if after is None else after(out)
    (s,) = torch.autograd.grad(out, z, dy)
    return s.flatten(0).reshape(y.shape[0], y.shape[dim])


def scored(layer, x, dy, after=None):
    """s [N, C] of a converted layer, by its gate."""
    tk.convert(layer)
    scores = tk.Scores(layer, None)
    y = layer(x)
    y = y if after is None else after(y)
    y.backward(dy)
    (s,) = layer.gate.drain()
    scores.detach()
    tk.revert(layer)
    return s


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@over_layers
def test_s_is_the_per_sample_gate_gradient(name, caller, training, layout, poisoned):
    layer, shape = build(name)
    layer.train(training)
    x = in_layout(normal(shape, 1), layout)
    with torch.no_grad():
        dy = in_layout(normal(tuple(copy.deepcopy(layer)(x).shape), 2), layout)
    want = explicit(copy.deepcopy(layer).double(), x.double(), dy.double())
    assert distance(scored(copy.deepcopy(layer), x, dy), want) < 1e-5
    assert distance(scored(copy.deepcopy(layer).double(), x.double(), dy.double()), want) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@over_layers
def test_bf16_is_no_worse_than_twice_eager(name, caller, layout):
    layer, shape = build(name)
    layer = layer.bfloat16()
    x = in_layout(normal(shape, 1).bfloat16(), layout)
    with torch.no_grad():
        dy = in_layout(normal(tuple(copy.deepcopy(layer)(x).shape), 2).bfloat16(), layout)
    want = explicit(copy.deepcopy(layer).double(), x.double(), dy.double())
    eager = distance(explicit(copy.deepcopy(layer), x, dy), want)
    assert distance(scored(copy.deepcopy(layer), x, dy), want) <= 2 * eager + 1e-6


def relu_(y):
    return torch.relu_(y)


def add_(y):
    y += 1.5
    return y


def sigmoid_(y):
    return y.sigmoid_()


@pytest.mark.parametrize("after", [relu_, add_, sigmoid_])
@over_layers
def test_in_place_operations_behind_the_layer_leave_s_right(name, caller, after):
    layer, shape = build(name)
    x = normal(shape, 1)
    with torch.no_grad():
        dy = normal(tuple(copy.deepcopy(layer)(x).shape), 2)
    want = explicit(copy.deepcopy(layer).double(), x.double(), dy.double(), after)
    assert distance(scored(layer, x, dy, after), want) < 1e-5


def overwritten(forward):
    """s of a convolution behind which a ReLU runs in place, when ``forward`` runs it; and what s should be."""
    torch.manual_seed(0)
    conv = tk.convert(nn.Conv2d(3, 4, 3))
    scores = tk.Scores(conv, None)
    x, used = normal((2, 3, 5, 5), 1), {name: normal(tuple(p.shape), 9) for name, p in conv.named_parameters()}
    y, weights = forward(conv, x, used)
    y.backward(dy := normal((2, 4, 3, 3), 2))
    (s,) = conv.gate.drain()
    assert scores.minibatches == 0
    plain = nn.Conv2d(3, 4, 3).double()
    plain.load_state_dict(weights)
    return s, explicit(plain, x.double(), dy.double(), relu_)


def test_an_overwritten_output_is_recomputed_with_the_weights_it_was_made_with():
    def functional(conv, x, used):
        return torch.func.functional_call(conv, used, (x,)).relu_(), used

    def swapped(conv, x, used):
        before = {name: p.detach().clone() for name, p in conv.named_parameters()}
        y = conv(x).relu_()
        for name, p in conv.named_parameters():
            p.data = used[name]
        return y, before

    def normalised(conv, x, used):
        nn.utils.spectral_norm(conv)
        y = conv(x).relu_()
        weights = {"weight": conv.weight.detach().clone(), "bias": conv.bias.detach()}
        with torch.no_grad():
            conv(x)  # another power iteration gives the layer another weight
        return y, weights

    for forward in (functional, swapped, normalised):
        s, want = overwritten(forward)
        assert distance(s, want) < 1e-5, forward.__name__


def test_in_place_on_output_and_input_is_refused():
    conv = tk.convert(nn.Conv2d(3, 4, 3))
    scores = tk.Scores(conv, None)
    x = normal((2, 3, 5, 5), 1)
    y = conv(x).relu_()
    with torch.no_grad():
        x.zero_()
    conv.weight.requires_grad_(False)  # torch's own check guards x only where the weight's gradient needs it
    with pytest.raises(tk.InplaceError, match="a scored Conv2d was overwritten in place"):
        y.sum().backward()
    assert scores.dropped == 0


@over_layers
def test_gradients_and_running_statistics_are_torchs(name, caller):
    layer, shape = build(name)
    layer = layer.double()
    x, ours = normal(shape, 1, torch.float64), tk.convert(copy.deepcopy(layer))
    results = []
    scores = tk.Scores(ours, None)
    for module in (layer, ours):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert ours.gate is not None and scores.minibatches == 1
    for want, got in zip(*results, strict=True):
        assert distance(got, want) < 1e-9


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics_with_any_momentum(caller, momentum):
    layer = nn.BatchNorm2d(5, momentum=momentum)
    ours = tk.convert(copy.deepcopy(layer))
    scores = tk.Scores(ours, None)
    for seed in range(4):
        x = normal((4, 5, 3, 3), seed) * 3 + 2
        layer(x), ours(x)
    assert scores.minibatches == 0
    for want, got in zip(layer.buffers(), ours.buffers(), strict=True):
        assert distance(got, want) < 1e-6


def test_untracked_statistics_stay_put(caller):
    layer = tk.convert(nn.BatchNorm2d(5))
    layer.track_running_stats = False
    before = [b.clone() for b in layer.buffers()]
    scores = tk.Scores(layer, None)
    layer(normal((4, 5, 3, 3), 1)).sum().backward()
    assert scores.minibatches == 1
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_gate_the_forward_is_torchs_bit_for_bit(name):
    layer, shape = build(name)
    ours, x = tk.convert(copy.deepcopy(layer)), normal(shape, 1)
    assert torch.equal(layer.eval()(x), ours.eval()(x))
    assert torch.equal(layer.train()(x), ours.train()(x))
    scores = tk.Scores(ours, None)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), ours.eval()(x))
    del scores  # nobody listens any more
    assert torch.equal(layer.train()(x), ours.train()(x)) and ours.gate.owner() is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@over_layers
def test_with_a_gate_too(name, caller, training, layout):
    layer, shape = build(name)
    ours, x = tk.convert(copy.deepcopy(layer)), in_layout(normal(shape, 1), layout)
    scores = tk.Scores(ours, None)
    y = ours.train(training)(x)
    assert torch.equal(layer.train(training)(x), y)
    for want, got in zip(layer.buffers(), ours.buffers(), strict=True):
        assert torch.equal(want, got)
    y.sum().backward()
    assert scores.minibatches == 1


def test_unbatched_inputs_are_a_batch_of_one():
    unbatched = [
        (nn.Conv1d(3, 6, 3), (3, 5)),
        (nn.Conv2d(3, 6, 3), (3, 5, 5)),
        (nn.Conv3d(3, 6, 3), (3, 5, 5, 4)),
        (nn.ConvTranspose1d(3, 6, 3), (3, 5)),
        (nn.ConvTranspose2d(3, 6, 3), (3, 5, 5)),
        (nn.ConvTranspose3d(3, 6, 3), (3, 5, 5, 4)),
        (nn.Linear(4, 3), (4,)),
    ]
    for layer, shape in unbatched:
        x = normal(shape, 1)
        with torch.no_grad():
            dy = normal(tuple(layer(x).shape), 2)
        batched = scored(copy.deepcopy(layer), x[None], dy[None])
        assert torch.allclose(scored(layer, x, dy), batched, rtol=1e-5)


def test_one_value_per_channel_is_refused_as_torch_does(caller):
    layer = tk.convert(nn.BatchNorm2d(3))
    scores = tk.Scores(layer, None)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match="4D"):
        layer(torch.ones(2, 3))
    assert scores.minibatches == 0


@pytest.mark.parametrize("outcome", ["square", "sum"])  # with a gradient that requires one itself, and a constant one
@pytest.mark.parametrize(
    "layers",
    [[nn.BatchNorm2d(3)], [nn.BatchNorm2d(3), nn.ReLU()], [nn.BatchNorm2d(3), nn.SiLU()], [nn.Conv2d(3, 4, 1)]],
    ids=["bn", "bn and relu", "bn and silu", "conv"],
)
def test_double_backward_is_refused(caller, layers, outcome):
    model = tk.convert(nn.Sequential(*copy.deepcopy(layers)), fuse=len(layers) > 1)
    scores = tk.Scores(model, None)
    x = normal((2, 3, 4, 4), 1).requires_grad_()
    y = model(x)
    loss = y.square().sum() if outcome == "square" else y.sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    assert scores.dropped == 0


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))


def test_conversion_keeps_modules_parameters_state_and_repr():
    model = small()
    modules, parameters, text, keys = list(model), list(model.parameters()), repr(model), list(model.state_dict())
    assert tk.convert(model) is model
    assert all(a is b for a, b in zip(modules, model, strict=True)) and type(model[0]) is tk.Conv2d
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert repr(model) == text and list(model.state_dict()) == keys
    tk.revert(model)
    assert type(model[0]) is nn.Conv2d and vars(model[0]).keys() == vars(nn.Conv2d(3, 4, 3)).keys()


def test_double_conversion_and_empty_models_are_refused():
    model = tk.convert(small())
    with pytest.raises(ValueError, match="converted already"):
        tk.convert(model)
    with pytest.raises(ValueError, match="no layer"):
        tk.convert(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no converted layer"):
        tk.revert(small())
    model(torch.ones(2, 3, 4, 4)).sum().backward()


def test_subclasses_with_their_own_forward_are_left_alone():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tk.convert(nn.Sequential(Doubled(3, 4, 3), nn.Conv2d(4, 5, 1)))
    assert type(model[0]) is Doubled and type(model[1]) is tk.Conv2d


def test_copies_and_pickles_carry_no_gate():
    model = tk.convert(small())
    scores = tk.Scores(model, torch.ones(2, 3, 4, 4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(normal((2, 3, 4, 4), 1)).sum().backward()
        assert all(getattr(module, "gate", None) is None for module in other)
    assert scores.minibatches == 0
    model(normal((2, 3, 4, 4), 1)).sum().backward()
    assert scores.minibatches == 1
