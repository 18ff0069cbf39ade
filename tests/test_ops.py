"""The operations, whichever backend serves them, against float64 autograd with an explicit gate."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from taylorkern import ops
from taylorkern.autograd import BatchNormAct, ChannelGate, FusedBatchNormAct
from tests.cases import LAYOUTS, SHAPES, distance, in_layout, normal

SLOPE = 0.1
# training, activation, residual
FORMS = [
    form
    for form in itertools.product([True, False], ops.ACTIVATIONS, [False, True])
    if not form[2] or ops.maskable(form[1])
]
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def column(v, x):
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def gated_batch_norm(x, residual, weight, bias, mean, var, z, training, eps, activation):
    """Plain autograd, the gate multiplied in: the definition that everything is compared with."""
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = x.mean(dims), x.var(dims, correction=0)
    y = (x - column(mean, x)) / column((var + eps).sqrt(), x) * column(weight, x) + column(bias, x)
    y = y * z.reshape(*z.shape, *[1] * (x.dim() - 2))
    y = y if residual is None else y + residual
    return ACTIVATIONS[activation](y)


def inputs(shape, layout, residual, dtype=torch.float32):
    c = shape[1]
    x = normal(shape, 1, dtype, layout) * 2 + 1
    r = normal(shape, 2, dtype, layout) if residual else None
    weight, bias, mean = (normal((c,), seed) for seed in (3, 4, 5))
    var = normal((c,), 6).square() + 0.5
    return x, r, weight, bias, mean, var, normal(shape, 7, dtype, layout)


def expected(x, residual, weight, bias, mean, var, dy, training, activation):
    x, residual, weight, bias, mean, var, dy = (
        None if t is None else t.double().detach() for t in (x, residual, weight, bias, mean, var, dy)
    )
    z = torch.ones(x.shape[:2], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, z)]
    leaves += [] if residual is None else [residual.requires_grad_()]
    y = gated_batch_norm(x, residual, weight, bias, mean, var, z, training, 1e-5, activation)
    dx, dweight, dbias, s, *dresidual = torch.autograd.grad(y, leaves, dy)
    return y, dx, dweight, dbias, s, dresidual[0] if dresidual else None


def computed(x, residual, weight, bias, mean, var, dy, training, activation):
    y, m, v, mask = ops.batch_norm_act(x, residual, weight, bias, mean, var, training, 1e-5, activation, SLOPE)
    saved = ops.told(residual, activation, y, mask)
    dx, dresidual, dweight, dbias, s = ops.batch_norm_act_backward(
        dy, x, saved, weight, bias, m, v, training, 1e-5, activation, SLOPE, residual is not None
    )
    return y, dx, dweight, dbias, s, dresidual if residual is not None else None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training,activation,residual", FORMS)
def test_batch_norm_act_is_the_gated_definition(shape, layout, training, activation, residual, poisoned):
    case = inputs(shape, layout, residual)
    if training and case[0].numel() == shape[1]:
        pytest.skip("one value per channel has no batch variance; torch refuses it too")
    # Where rounding moves an element across the ReLU's kink both one-sided derivatives are right: keep away from it.
    names = "y dx dweight dbias s dresidual".split()
    wide = expected(*case, training, activation)
    for name, got, want in zip(names, computed(*case, training, activation), wide, strict=True):
        if want is None:
            assert got is None
        elif float(want.detach().norm()) > 1e-3:
            assert distance(got, want) < 1e-5, name
        else:  # a gradient that vanishes analytically, as dx of two values per channel does
            assert float((got.double() - want).detach().norm()) < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_scores_is_the_sum(shape, layout, poisoned):
    a, g = normal(shape, 1, layout=layout), normal(shape, 2, layout=layout)
    want = (a.double() * g.double()).reshape(*shape[:2], -1).sum(2)
    assert distance(ops.channel_scores(a, g), want) < 1e-5
    assert distance(ops.channel_scores(a.double(), g.double()), want) < 1e-13


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
def test_empty_tensors_score_zero(shape):
    s = ops.channel_scores(torch.zeros(shape), torch.zeros(shape))
    assert s.shape == shape[:2] and not s.any()


def test_layouts_of_activation_and_gradient_may_differ():
    shape = (3, 20, 6, 5)
    a, g = normal(shape, 1), normal(shape, 2)
    want = ops.channel_scores(a, g)
    assert distance(ops.channel_scores(in_layout(a, "channels_last"), g), want) < 1e-6
    sliced = normal((3, 40, 6, 5), 3)[:, ::2]
    assert distance(ops.channel_scores(sliced, g), ops.channel_scores(sliced.contiguous(), g)) < 1e-6
    assert distance(ops.channel_scores(a, g[:1, :, :1, :1].expand(shape)), (a * g[:1, :, :1, :1]).sum((2, 3))) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_keeps_dtype_and_layout(dtype, layout):
    x, r, weight, bias, mean, var, dy = inputs((2, 16, 6, 6), layout, True, dtype)
    for activation in ("relu", "relu6"):
        y, m, _, mask = ops.batch_norm_act(x, r, weight, bias, mean, var, True, 1e-5, activation)
        told = ops.told(r, activation, y, mask)
        dx, dresidual, dweight, _, s = ops.batch_norm_act_backward(
            dy, x, told, weight, bias, m, var, True, 1e-5, activation, 0.0, True
        )
        for t in (y, dx, dresidual, told):
            assert t.dtype == (torch.bool if t is mask else dtype) and t.stride() == x.stride()
        for t in (m, dweight, s):
            assert t.dtype == ops.accumulator(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads(layout):
    case = inputs((1, 40, 57, 31), layout, True)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(computed(*case, True, "relu"))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_variance_survives_a_large_mean():
    x = normal((4, 8, 20, 20), 1) + 1e4
    _, mean, var, _ = ops.batch_norm_act(x, None, None, None, None, None, True, 1e-5, "none")
    assert distance(var, x.double().var((0, 2, 3), correction=0)) < 1e-5
    assert distance(mean, x.double().mean((0, 2, 3))) < 1e-7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    a, g = normal((2, 5, 4, 3), 1, layout=layout), normal((2, 5, 4, 3), 2, layout=layout)
    opcheck(torch.ops.taylorkern.channel_scores.default, (a, g))
    for training, activation, residual in FORMS:
        x, r, weight, bias, mean, var, dy = inputs((3, 5, 4, 3), layout, residual)
        forward = (x, r, weight, bias, mean, var, training, 1e-5, activation, SLOPE)
        opcheck(torch.ops.taylorkern.batch_norm_act.default, forward)
        y, *_, mask = ops.batch_norm_act(*forward)
        told = ops.told(r, activation, y, mask)
        backward = (dy, x, told, weight, bias, mean, var, training, 1e-5, activation, SLOPE, residual)
        opcheck(torch.ops.taylorkern.batch_norm_act_backward.default, backward)


@pytest.mark.parametrize("training,activation,residual", FORMS)
def test_gradcheck(training, activation, residual):
    x, r, weight, bias, mean, var, _ = inputs((3, 4, 3, 2), "contiguous", residual, torch.float64)
    leaves = [t.double().requires_grad_() for t in ([x, weight, bias] if r is None else [x, weight, bias, r])]

    def run(x, weight, bias, r=None):
        z = torch.ones(3, 4, dtype=torch.float64)
        return FusedBatchNormAct.apply(
            x, r, weight, bias, z, lambda *_: None, mean, var, training, 1e-5, activation, SLOPE
        )

    def attached(x, weight, bias, r=None):
        z = torch.ones(3, 4, dtype=torch.float64)
        with torch.no_grad():
            forward = ops.batch_norm_act(x, r, weight, bias, mean, var, training, 1e-5, activation, SLOPE)
        return BatchNormAct.apply(x, r, weight, bias, z, None, None, *forward, training, 1e-5, activation, SLOPE)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(attached, leaves)


def test_gradcheck_of_the_channel_gate():
    a = normal((2, 3, 4), 1, torch.float64).requires_grad_()
    z = torch.ones(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: ChannelGate.apply(a, z, None, lambda t: t, lambda: a, None), [a])


def test_bad_arguments_are_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        ops.channel_scores(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match="gelu"):
        ops.batch_norm_act(x, None, None, None, None, None, True, 1e-5, "gelu")
    with pytest.raises(ValueError, match="running_mean"):
        ops.batch_norm_act(x, None, None, None, None, None, False, 1e-5, "none")
    for activation in ("silu", "hardswish"):
        with pytest.raises(ValueError, match=f"the gradient of {activation} can't be told from a mask"):
            ops.batch_norm_act_backward(x, x, x > 0, None, None, x[0], x[0], True, 1e-5, activation)
    with pytest.raises(ValueError, match=r"relu6 needs a mask of bool, got torch\.float32"):
        ops.batch_norm_act_backward(x, x, x, None, None, x[0], x[0], True, 1e-5, "relu6")
