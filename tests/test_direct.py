"""Batch normalisation in C++ from end to end: to the bit what Python makes of the same kernels, whatever the call."""

import copy

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern.layers import fused_batch_norm
from tests.callers import equal, needs_library
from tests.cases import LAYOUTS, in_layout, normal
from tests.fused import CALLERS, X, called_from

pytestmark = needs_library

# The activation, its slope, and whether a residual is added before it; None is the gated layer by itself.
KINDS = {
    "gated": None,
    "sum": ("none", 0.0, True),
    "relu": ("relu", 0.0, False),
    "silu": ("silu", 0.0, False),
    "sum and relu": ("relu", 0.0, True),
    "sum and relu6": ("relu6", 0.0, True),
    "sum and leaky relu": ("leaky_relu", 0.1, True),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 11), (4, 11, 9), (3, 7, 5, 9), (4, 33, 1, 1), (3, 32, 4, 4), (1, 9, 6, 7), (2, 1, 3, 3), (2, 5, 3, 4, 2)]

over_kinds = pytest.mark.parametrize("kind", KINDS)


def norm(x, **options):
    """A normalisation for ``x`` in the dtype that goes with it, as after some training."""
    layer = LAYERS[x.dim()](x.shape[1], **options).to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        for seed, t in enumerate([*layer.parameters(), *layer.buffers()]):
            if t.dim():
                t.copy_(0.3 * normal(tuple(t.shape), seed) + 1).abs_()
    return layer


def run(layer, x, kind, residual=None):
    if KINDS[kind] is None:
        return layer(x)
    activation, slope, added = KINDS[kind]
    return fused_batch_norm(layer, layer.gate, x, residual if added else None, activation, slope)


def outcome(layer, x, kind, dy=None, residual=None, frozen=()):
    """y, the gradients and s, and the statistics, of one step; what is in ``frozen`` requires no gradient."""
    layer, x = tk.convert(copy.deepcopy(layer)), x.clone().requires_grad_("x" not in frozen)
    scores = None if "gate" in frozen else tk.Scores(layer, None)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    residual = (-x if residual is None else residual).detach().clone().requires_grad_("residual" not in frozen)
    y = run(layer, x, kind, residual)
    y.backward(y.detach().cos() if dy is None else dy)
    s = layer.gate.drain() if scores else []
    return [y, x.grad, residual.grad, *(p.grad for p in layer.parameters()), *s, *layer.buffers()]


def both(*arguments, calls=1, **options):
    """The same ``outcome`` from C++, in as many ``calls`` of it as expected, and from Python."""
    results = []
    for caller in CALLERS:
        with called_from(caller) as counts:
            results.append(outcome(*arguments, **options))
        assert counts.total() == (calls if caller == "C++" else 0)
    equal(*results)
    return results[0]


@over_kinds
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_dtypes_and_layouts(shape, dtype, layout, kind, poisoned):
    x = normal(shape, 1, dtype, layout)
    served = x.is_contiguous() or layout == "contiguous" or x.dim() in (4, 5)  # torch knows no other channels_last
    for training in (True, False):
        both(norm(x).train(training), x, kind, calls=int(served))


@over_kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False, "eps": 0.5},
    ],
    ids=str,
)
def test_options(options, dtype, kind):
    x = normal((3, 7, 5, 9), 1, dtype)
    layer = norm(x, **options)
    for training in (True, False):
        both(layer.train(training), x, kind)
    if layer.affine:
        layer.register_parameter("bias", None)
        both(layer, x, kind)
    if layer.track_running_stats:
        layer.track_running_stats = False
        for training in (True, False):
            both(layer.train(training), x, kind)


@over_kinds
def test_several_batches_without_a_momentum(kind):
    x = normal((3, 7, 5, 9), 1)
    layer = tk.convert(norm(x, momentum=None))
    layers = {caller: copy.deepcopy(layer) for caller in CALLERS}
    for caller, own in layers.items():
        scores = tk.Scores(own, None)
        with called_from(caller):
            for seed in range(3):
                run(own, normal((3, 7, 5, 9), seed), kind, x).sum().backward()
        assert scores.minibatches == 3 and own.num_batches_tracked == 3
    equal(*(list(own.buffers()) for own in layers.values()))


@over_kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_residuals_in_other_layouts(layout, dtype, kind):
    x = normal((3, 7, 5, 9), 1, dtype, layout)
    (other,) = {*LAYOUTS} - {layout}
    dense = normal(tuple(x.shape), 2, dtype)
    strided = normal((3, 7, 10, 9), 2, dtype)[:, :, ::2]
    for given in (in_layout(dense, other), strided, dense.flip(0).transpose(2, 3).contiguous().transpose(2, 3)):
        both(norm(x), x, kind, dy=given)
        both(norm(x), x, kind, residual=given)
    for given in (torch.ones((), dtype=dtype), dense[:1, :, :1, :1], dense[:, :1]):
        both(norm(x), x, kind, dy=given.expand(x.shape))
        both(norm(x), x, kind, residual=given.expand(x.shape))


FROZEN = [
    ("x",),
    ("weight",),
    ("bias", "gate"),
    ("residual",),
    ("gate",),
    ("x", "residual"),
    ("weight", "bias"),
    ("x", "weight", "bias"),
    ("x", "weight", "bias", "residual"),
    ("x", "weight", "residual", "gate"),
    ("residual", "weight", "bias", "gate"),
]


@over_kinds
@pytest.mark.parametrize("frozen", FROZEN, ids=", ".join)
def test_nothing_is_computed_for_what_is_frozen(frozen, kind):
    x = normal((3, 7, 5, 9), 1)
    served = kind != "gated" or "gate" not in frozen
    _, *gradients = both(norm(x), x, kind, calls=int(served), frozen=frozen)
    for name, gradient in zip(("x", "residual", "weight", "bias"), gradients, strict=False):
        assert (gradient is not None) == (name not in frozen and (name != "residual" or "sum" in kind)), name


@over_kinds
def test_parts_of_the_gradients_by_name(kind):
    results = []
    for caller in CALLERS:
        layer, x = tk.convert(norm(X)), X.clone().requires_grad_()
        residual = (2 * X).requires_grad_()
        scores = tk.Scores(layer, None)
        with called_from(caller):
            y = run(layer, x, kind, residual)
            wanted = [x, layer.weight, layer.bias, *layer.gate.leaves(), *[residual] * ("sum" in kind)]
            parts = [torch.autograd.grad(y.sin().sum(), part, retain_graph=True)[0] for part in wanted]
        assert scores.minibatches == 0
        results.append(parts)
    equal(*results)


@over_kinds
def test_another_dtype_by_autocast(kind):
    """The convolution's output, and so the normalisation's, is bfloat16; what comes back is float32 at first."""
    conv = nn.Conv2d(3, 3, 1)
    results = []
    for caller in CALLERS:
        layer, model = tk.convert(norm(X)), copy.deepcopy(conv)
        scores = tk.Scores(layer, None)
        with called_from(caller) as counts, torch.autocast("cpu", torch.bfloat16):
            x = model(X)
            y = run(layer, x, kind, x)
            assert y.dtype is torch.bfloat16
            y.float().cos().sum().backward()
        assert counts.total() == (caller == "C++") and scores.dropped == 0
        results.append([y, *layer.gate.drain(), *(p.grad for m in (layer, model) for p in m.parameters())])
    equal(*results)


@over_kinds
def test_an_input_that_is_its_own_residual(kind):
    results = []
    for caller in CALLERS:
        layer, x = tk.convert(norm(X)), X.clone().requires_grad_()
        scores = tk.Scores(layer, None)
        with called_from(caller):
            run(layer, x, kind, x).sin().sum().backward()
        results.append([x.grad, *layer.gate.drain()])
        assert scores.dropped == 0
    equal(*results)
