"""What every backend's kernels are held to: the float64 reference, by the size of the terms that rounding acts on."""

import itertools

import torch

from taylorkern import ops
from taylorkern.backends import reference
from tests.cases import distance, in_layout, normal

# Of float64 all is summed in float64, of the others in float32.
SUMS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# Half a unit of bf16 is 2^-9, of fp16 2^-11.
ELEMENTS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
EPS, SLOPE = 1e-5, 0.1
# activation, residual
FORMS = [(activation, False) for activation in ops.ACTIVATIONS]
FORMS += [(activation, True) for activation in ops.ACTIVATIONS if ops.maskable(activation)]
EVERY = list(itertools.product((True, False), FORMS))  # training, and one of these
EXACT = ("none", "relu", "relu6")  # dz is dy or 0

MORE_SHAPES = [(1, 2, 300, 301), (70, 33, 5), (3, 257, 9, 9), (1, 1, 70001), (300, 40), (1, 65, 40, 3)]
VIEWS = {
    "sliced channels": lambda t: t[:, ::2],
    "sliced channels, channels last": lambda t: in_layout(t, "channels_last")[:, ::2],
    "cropped": lambda t: t[..., 1:-1, 1:],
    "cropped channels last": lambda t: in_layout(t, "channels_last")[..., 1:-1, 1:],
    "expanded over space": lambda t: t[..., :1, :1].expand(t.shape),
    "expanded over samples": lambda t: t[:1].expand(t.shape),
    "space transposed": lambda t: t.transpose(2, 3),
    "samples innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def batch_norm_inputs(shape, dtype, layout):
    C = shape[1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": normal(shape, 1, dtype, layout),
        "dy": normal(shape, 2, dtype, layout),
        "residual": normal(shape, 3, dtype, layout),
        "weight": normal((C,), 4, acc),
        "bias": normal((C,), 5, acc),
        "mean": normal((C,), 6, acc),
        "var": normal((C,), 7, acc).abs() + 0.5,
    }
    tensors["x"] += 0.5
    return tensors


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def two_pass(x):
    """Mean and biased variance in float64; torch.var_mean is 50 times further from the truth."""
    x = x.double()
    dims = [d for d in range(x.dim()) if d != 1]
    pivot = x.mean(dims, keepdim=True)
    return pivot.flatten() + (x - pivot).mean(dims), ((x - pivot) ** 2).mean(dims)


def forward(backend, of, training, activation, residual, cast=lambda t: t):
    arguments = (
        of["x"],
        of["residual"] if residual else None,
        of["weight"],
        of["bias"],
        of["mean"],
        of["var"],
        training,
        EPS,
        activation,
        SLOPE,
    )
    return backend.batch_norm_act(*map(cast, arguments))


def told(made, activation, residual):
    """What the backward takes to know act', of what ``forward`` has made."""
    y, _, _, mask = made
    return ops.told(y if residual else None, activation, y, mask)


def backward(backend, of, mask, mean, var, training, activation, residual, cast=lambda t: t):
    arguments = (
        of["dy"],
        of["x"],
        mask,
        of["weight"],
        of["bias"],
        mean,
        var,
        training,
        EPS,
        activation,
        SLOPE,
        residual,
    )
    return backend.batch_norm_act_backward(*map(cast, arguments))


def check_channel_scores(kernels, a, g):
    dtype = a.dtype
    s = kernels.channel_scores(a, g)
    assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert s.is_contiguous()
    # the honest measure of a sum is the size of its terms
    size = reference.channel_scores(a.double().abs(), g.double().abs())
    error = (s.double() - reference.channel_scores(a.double(), g.double())).abs()
    assert bool((error <= SUMS[dtype] * size).all())


def check_forward(kernels, of, forms):
    """y, mean, var and mask over ``forms``, pairs of training and (activation, residual)."""
    dtype = of["x"].dtype
    for training, (activation, residual) in forms:
        y, mean, var, mask = forward(kernels, of, training, activation, residual)
        *expected, passes = forward(reference, of, training, activation, residual, cast=wide)
        assert y.dtype == dtype
        assert y.stride() == torch.empty_like(of["x"]).stride()
        # x*scale + (bias - mean*scale) as torch rounds it: as exact as the size of its terms
        scale = (of["weight"].double() / (expected[2] + EPS).sqrt()).abs()
        terms = (of["x"].abs().double().amax() + expected[1].abs()) * scale + of["bias"].abs()
        size = torch.maximum(terms.max(), expected[0].abs().max())
        assert bool(((y.double() - expected[0]).abs() <= 2 * ELEMENTS[dtype] * size).all()), (training, activation)
        assert mask.dtype == torch.bool and mask.stride() == passes.stride()
        # what rounding moves across a kink lies next to it, before the activation as well as behind it
        beside = torch.minimum(expected[0].abs(), (expected[0] - 6).abs()) <= 2 * SUMS[dtype] * size
        assert bool(((mask == passes) | beside).all()) if mask.numel() else not passes.numel(), (training, activation)
        exact = two_pass(of["x"]) if training else expected[1:]
        assert distance(mean, exact[0]) < SUMS[dtype]
        assert distance(var, exact[1]) < SUMS[dtype] or float(exact[1].max()) == float(var.max()) == 0


def check_backward(kernels, of, forms):
    """All gradients and s, over ``forms`` as in :func:`check_forward`."""
    dtype = of["x"].dtype
    # statistics of few values make 1 / std ill-conditioned, so both start from given ones
    for training, (activation, residual) in forms:
        mean, var = of["mean"], of["var"]
        given = told(forward(kernels, of, False, activation, residual), activation, residual)
        got = backward(kernels, of, given, mean, var, training, activation, residual)
        # where z is computed the forward with a residual of zeros decides, so that both are on the same side of a kink
        if not residual and ops.maskable(activation):
            nothing = of | {"residual": torch.zeros_like(of["x"])}
            given = told(forward(kernels, nothing, False, activation, True), activation, True)
        expected = backward(reference, of, given, mean, var, training, activation, residual, cast=wide)
        dx, dresidual, dweight, dbias, s = got
        assert dx.stride() == torch.empty_like(of["x"]).stride()
        assert dx.dtype == dtype
        assert distance(dx, expected[0]) < 4 * ELEMENTS[dtype]
        assert distance(dresidual, expected[1]) <= (0 if activation in EXACT else ELEMENTS[dtype])
        for got_sum, expected_sum in zip((dweight, dbias, s), expected[2:], strict=True):
            assert distance(got_sum, expected_sum) < 20 * SUMS[dtype], (training, activation, residual)
