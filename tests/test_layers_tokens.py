"""Gated normalisations over groups and features, and embeddings: s against float64 gates, drop-in behaviour."""

import copy
import pickle

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern.layers import channel_dim, gateable, scorable, width
from tests.cases import LAYOUTS, distance, in_layout, normal
from tests.listener import Listener

# A layer's constructor, an input shape it takes and the dimension of its channels; odd sizes, one of everything.
LAYERS = {
    "groups": (lambda: nn.GroupNorm(3, 9), (2, 9, 5, 7), 1),
    "one group": (lambda: nn.GroupNorm(1, 7), (3, 7, 4, 4), 1),
    "a group a channel": (lambda: nn.GroupNorm(5, 5), (1, 5, 3, 1), 1),
    "groups without affine": (lambda: nn.GroupNorm(2, 6, affine=False), (2, 6, 9), 1),
    "groups of vectors": (lambda: nn.GroupNorm(2, 6), (5, 6), 1),
    "groups of volumes": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 2, 5), 1),
    "features": (lambda: nn.LayerNorm(7), (5, 7), -1),
    "features of tokens": (lambda: nn.LayerNorm(7), (3, 6, 7), -1),
    "features of a grid": (lambda: nn.LayerNorm(5, bias=False), (2, 3, 6, 5), -1),
    "features without affine": (lambda: nn.LayerNorm(7, elementwise_affine=False), (3, 6, 7), -1),
    "tokens and features": (lambda: nn.LayerNorm((6, 7)), (3, 6, 7), -1),
    "mean squares": (lambda: nn.RMSNorm(7), (3, 6, 7), -1),
    "mean squares without affine": (lambda: nn.RMSNorm(7, elementwise_affine=False), (1, 1, 7), -1),
    "mean squares over tokens": (lambda: nn.RMSNorm((6, 7)), (3, 6, 7), -1),
    "embedding": (lambda: nn.Embedding(10, 7), (3, 6), -1),
    "embedding of one id a sample": (lambda: nn.Embedding(10, 7, padding_idx=0), (5,), -1),
    "embedding of a grid": (lambda: nn.Embedding(4, 1), (2, 3, 5), -1),
    "embedding of bounded norm": (lambda: nn.Embedding(10, 7, max_norm=1.0), (3, 6), -1),
}
over_layers = pytest.mark.parametrize("name", LAYERS)


def build(name):
    torch.manual_seed(3)
    make, *shape_and_dim = LAYERS[name]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, *shape_and_dim


def given(layer, shape, dtype=torch.float32):
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, shape, generator=torch.Generator().manual_seed(1))
    return normal(shape, 1, dtype)


def explicit(layer, x, dim, dy, after=None):
    """Gradient of a gate multiplied in, per sample and channel, in float64."""
    y = copy.deepcopy(layer).double()(x.double() if x.is_floating_point() else x)
    shape = [n if d in (0, dim % y.dim()) else 1 for d, n in enumerate(y.shape)]
    z = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    out = y * z if after is None else after(y * z)
    (s,) = torch.autograd.grad(out, z, dy.double())
    return s.reshape(y.shape[0], y.shape[dim])


def scored(layer, x, dy, after=None):
    layer = tk.convert(copy.deepcopy(layer))
    listener = Listener(layer)
    # Torch's own backward of channels_last groups crashes where the input wants no gradient.
    y = layer(x.clone(memory_format=torch.preserve_format).requires_grad_() if x.is_floating_point() else x)
    (y if after is None else after(y)).backward(dy)
    return listener.heard_of()


def upstream(layer, x, dtype=torch.float32):
    return normal(tuple(copy.deepcopy(layer)(x).shape), 2, dtype)


@over_layers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_s_is_the_per_sample_gate_gradient(name, layout, poisoned):
    layer, shape, dim = build(name)
    x = given(layer, shape)
    x = in_layout(x, layout) if x.dim() > 1 else x
    dy = in_layout(upstream(layer, x), layout)
    want = explicit(layer, x, dim, dy)
    assert distance(scored(layer, x, dy), want) < 1e-5
    double = x.double() if x.is_floating_point() else x
    assert distance(scored(copy.deepcopy(layer).double(), double, dy.double()), want) < 1e-12


@over_layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_add_up_in_float32(name, dtype):
    layer, shape, dim = build(name)
    layer = layer.to(dtype)
    x = given(layer, shape, dtype)
    dy = upstream(layer, x, dtype)
    s = scored(layer, x, dy)
    y, dy = layer(x).double(), dy.double()
    summed = [d for d in range(1, y.dim()) if d != dim % y.dim()]
    assert s.dtype is torch.float32
    assert distance(s, (y * dy).sum(summed) if summed else y * dy) < 1e-6


def relu_(y):
    return torch.relu_(y)


def add_(y):
    y += 1.5
    return y


@over_layers
@pytest.mark.parametrize("after", [relu_, add_])
def test_in_place_operations_behind_the_layer_leave_s_right(name, after):
    layer, shape, dim = build(name)
    x = given(layer, shape)
    dy = upstream(layer, x)
    assert distance(scored(layer, x, dy, after), explicit(layer, x, dim, dy, after)) < 1e-5


@pytest.mark.parametrize(
    ("name", "shape"),
    [("features", (7,)), ("tokens and features", (6, 7)), ("mean squares", (7,)), ("embedding", ())],
)
def test_an_input_without_a_batch_is_a_batch_of_one(name, shape):
    layer, *_ = build(name)
    x = given(layer, shape)
    dy = upstream(layer, x)
    alone = scored(layer, x, dy)
    assert alone.shape == (1, 7)
    assert torch.equal(alone, scored(layer, x[None], dy[None]))


@over_layers
def test_gradients_and_outputs_are_torchs_bit_for_bit(name):
    layer, shape, _ = build(name)
    ours = tk.convert(copy.deepcopy(layer))
    x = given(layer, shape)
    plain, converted = layer(x), ours(x)
    listener = Listener(ours)
    gated = ours(x)
    assert torch.equal(plain, converted) and torch.equal(plain, gated)
    if list(layer.parameters()):
        for y in (plain, gated):
            y.square().sum().backward()
        assert listener.heard()
    for want, got in zip(layer.parameters(), ours.parameters(), strict=True):
        assert torch.equal(want.grad, got.grad)
    with torch.no_grad():
        assert not ours(x).requires_grad


@over_layers
def test_they_are_torchs_to_the_eye(name):
    layer, shape, dim = build(name)
    ours = getattr(tk, type(layer).__name__)
    converted = tk.convert(copy.deepcopy(layer))
    assert type(converted) is ours and issubclass(ours, type(layer))
    assert repr(converted) == repr(layer) and list(converted.state_dict()) == list(layer.state_dict())
    y = layer(given(layer, shape))
    assert channel_dim(layer, y) == dim % y.dim() and width(layer) == width(converted) == y.shape[dim]
    assert gateable(layer) and gateable(converted) and scorable(converted) and not scorable(layer)
    assert type(tk.revert(converted)) is type(layer) and vars(converted).keys() == vars(layer).keys()


def test_copies_and_pickles_carry_no_gate():
    model = tk.convert(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)))
    listener = Listener(model)
    x = torch.tensor([1, 2, 4])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(x).sum().backward()
        assert all(module.gate is None for module in other)
    assert not listener.heard()
    model(x).sum().backward()
    assert {name: [tuple(s.shape) for s in found] for name, found in listener.heard().items()} == {
        str(i): [(3, 4)] for i in range(4)
    }


def test_embedding_weights_of_a_pretrained_table():
    table = normal((6, 3), 1)
    layer = tk.Embedding.from_pretrained(table)
    assert type(layer) is tk.Embedding and torch.equal(layer(torch.tensor([5])), table[5:])
