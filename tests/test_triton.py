"""The kernels in Triton against the float64 reference: compiled where there is a GPU, else by Triton's interpreter."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch

from taylorkern.backends import reference, triton_tiles
from taylorkern.backends import triton_operations as operations
from tests.agreement import (
    EPS,
    FORMS,
    SLOPE,
    VIEWS,
    backward,
    batch_norm_inputs,
    check_backward,
    check_forward,
    forward,
    told,
    two_pass,
    wide,
)
from tests.cases import LAYOUTS, SHAPES, distance, in_layout, normal

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = 1e-6  # all are summed in float32
ELEMENTS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Several chunks of a sample, several groups of samples with a smaller last one, several columns with one
MORE_SHAPES = [(1, 2, 30, 101), (41, 70, 2), (3, 130, 5, 5)]
ALL_FORMS = list(itertools.product((True, False), FORMS))  # training, (activation, residual)
TOGETHER = 2  # forms tried on one shape, dtype and layout


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """The interpreter runs programs one after another, so small tensors get several groups and chunks there."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            for name, number in {"PROGRAMS": 6, "ENOUGH": 2, "LEAST_CHUNK": 16, "RUN": 64}.items():
                patch.setattr(triton_tiles, name, number)
        triton_tiles.tiles.cache_clear()
        yield
    triton_tiles.tiles.cache_clear()


@pytest.fixture(autouse=True)
def kernels_are_there(poisoned):
    assert operations.supports("channel_scores", torch.ones(1, 1, device=DEVICE)), operations.status().reason


def inputs(shape, dtype, layout="contiguous"):
    of = batch_norm_inputs(shape, dtype, layout)
    return {name: in_layout(t.to(DEVICE), layout) if t.dim() > 1 else t.to(DEVICE) for name, t in of.items()}


def cases():
    """Each shape meets each form, and each dtype and layout; so do forms and dtypes."""
    variants = list(itertools.product(DTYPES, LAYOUTS))
    for i, shape in enumerate(SHAPES + MORE_SHAPES):
        for k, (dtype, layout) in enumerate(variants):
            begin = (i + k) * TOGETHER
            forms = [ALL_FORMS[j % len(ALL_FORMS)] for j in range(begin, begin + TOGETHER)]
            yield pytest.param(shape, dtype, layout, forms, id=f"{shape}-{dtype}-{layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_channel_scores_agree_with_float64(shape, dtype, layout):
    a, g = (in_layout(normal(shape, seed, dtype).to(DEVICE), layout) for seed in (1, 2))
    s = operations.channel_scores(a, g)
    assert s.dtype == torch.float32 and s.is_contiguous()
    size = reference.channel_scores(a.double().abs(), g.double().abs())
    error = (s.double() - reference.channel_scores(a.double(), g.double())).abs()
    assert bool((error <= SUMS * size).all())


@pytest.mark.parametrize(("shape", "dtype", "layout", "forms"), list(cases()))
def test_batch_norm_agrees_with_float64(shape, dtype, layout, forms):
    check_forward(operations, inputs(shape, dtype, layout), forms)


@pytest.mark.parametrize(("shape", "dtype", "layout", "forms"), list(cases()))
def test_batch_norm_backward_agrees_with_float64(shape, dtype, layout, forms):
    check_backward(operations, inputs(shape, dtype, layout), forms)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 8, 20, 20), (8, 5, 33, 31), (2, 40, 7, 7), (400, 19), (1, 3, 7001)])
def test_statistics_survive_a_large_mean(shape, layout):
    """Raw sums of squares would lose every digit here."""
    x = (in_layout(normal(shape, 1, torch.float64), layout) + 1e4).float().to(DEVICE)
    _, mean, var, _ = operations.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    exact_mean, exact_var = two_pass(x.double() - 1e4)
    assert distance(mean, exact_mean + 1e4) < torch.finfo(torch.float32).eps
    assert distance(var, exact_var) < 1e-6


def test_statistics_survive_an_outlier_where_the_first_pivot_is():
    x = normal((64, 3, 16, 16), 1)
    x[0, :, 0, 0] = 1e4
    _, mean, var, _ = operations.batch_norm_act(x.to(DEVICE), None, None, None, None, None, True, EPS, "none", 0.0)
    exact_mean, exact_var = two_pass(x)
    assert float((mean.cpu() - exact_mean).abs().max()) < 1e-6 * float(exact_var.sqrt().max())
    assert distance(var.cpu(), exact_var) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_constant_are_exact(layout):
    x = in_layout(torch.full((3, 5, 7, 9), 0.1, device=DEVICE), layout)
    _, mean, var, _ = operations.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    assert torch.equal(mean.cpu(), torch.full((5,), 0.1))
    assert bool((var >= 0).all())
    assert float(var.max()) < 1e-15


def everything(of):
    relu, relu6 = (forward(operations, of, True, activation, True) for activation in ("relu", "relu6"))
    return [
        operations.channel_scores(of["x"], of["dy"]),
        *relu,
        *relu6,
        *backward(operations, of, told(relu, "relu", True), *relu[1:3], True, "relu", True),
        *backward(operations, of, told(relu6, "relu6", True), *relu6[1:3], True, "relu6", True),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_repetition_nor_on_where_memory_begins(dtype, layout):
    of = inputs((3, 33, 7, 11), dtype, layout)
    first = everything(of)
    shifted = {name: moved_by_an_element(t) for name, t in of.items()}
    assert all(t.data_ptr() % 16 and t.stride() == of[name].stride() for name, t in shifted.items())
    for again in (everything(of), everything(shifted)):
        assert all(map(torch.equal, again, first))


def moved_by_an_element(t):
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return memory.as_strided(t.shape, t.stride(), 1).copy_(t)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_mask_is_the_forwards_own(dtype, layout):
    """act' from x is what the forward tells, bit for bit, next to kinks too."""
    of = inputs((2, 37, 13, 3), dtype, layout)
    of["bias"].zero_()
    of["x"] = (of["x"] * 4).round() / 4  # many values that are their channel's mean, or nearly
    of["mean"] = (of["mean"] * 4).round() / 4
    of["residual"].zero_()
    of["weight"] *= 8
    for training, activation in itertools.product((True, False), ("relu", "relu6", "leaky_relu")):
        made = forward(operations, of, training, activation, True)
        mean, var, given = *made[1:3], told(made, activation, True)
        from_x = backward(operations, of, None, mean, var, training, activation, True)
        from_given = backward(operations, of, given, mean, var, training, activation, True)
        assert 0.2 < float((given > 0).double().mean()) < 0.8
        assert torch.equal(from_x[1], from_given[1])
        # a kernel that loads other tensors may add in another order
        for a, b in zip(from_x, from_given, strict=True):
            assert distance(a, b) <= (0 if DEVICE == "cpu" else SUMS)


def test_missing_affine_is_one_and_zero():
    of = inputs((3, 7, 5, 5), torch.float32)
    ones = of | {"weight": torch.ones(7, device=DEVICE), "bias": torch.zeros(7, device=DEVICE)}
    for other in ({"weight": None}, {"bias": None}, {"weight": None, "bias": None}):
        none, given = of | other, of | {name: ones[name] for name in other}
        made = forward(operations, given, True, "relu", True)
        for got, expected in zip(forward(operations, none, True, "relu", True), made, strict=True):
            assert torch.equal(got, expected)
        mask, mean, var = told(made, "relu", True), *made[1:3]
        expected = backward(operations, given, mask, mean, var, True, "relu", False)
        for a, b in zip(backward(operations, none, mask, mean, var, True, "relu", False), expected, strict=True):
            assert distance(a, b) <= (0 if DEVICE == "cpu" else SUMS)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    of = inputs((3, 18, 6, 5), torch.float32)
    for name in ("x", "dy", "residual"):
        of[name] = view(of[name])
    C = of["x"].shape[1]
    for name in ("weight", "bias", "mean", "var"):
        of[name] = of[name].repeat_interleave(2)[::2][:C]
    kept = {name: t.clone() for name, t in of.items()}
    s = operations.channel_scores(of["x"], of["dy"])
    assert distance(s, reference.channel_scores(of["x"].double(), of["dy"].double())) < 1e-6
    made = forward(operations, of, True, "relu6", True)
    mean, var, given = *made[1:3], told(made, "relu6", True)
    for got, expected in zip(made, forward(reference, of, True, "relu6", True, cast=wide), strict=True):
        assert got.stride() == expected.stride()
        assert distance(got, expected) < 1e-5
    got = backward(operations, of, given, mean, var, True, "relu6", True)
    for a, b in zip(got, backward(reference, of, given, mean, var, True, "relu6", True, cast=wide), strict=True):
        assert distance(a, b) < 1e-5
    for name, t in of.items():
        assert torch.equal(t, kept[name]), f"{name} was written to"


def test_layouts_may_differ_between_arguments():
    of = inputs((3, 18, 6, 5), torch.float32, "channels_last")
    mixed = of | {name: of[name].contiguous() for name in ("dy", "residual")}
    made = forward(operations, mixed, True, "relu6", True)
    mean, var, given = *made[1:3], told(made, "relu6", True)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (made[0], given))
    assert all(map(torch.equal, made, forward(operations, of, True, "relu6", True)))
    got = backward(operations, mixed, given.contiguous(), mean, var, True, "relu6", True)
    assert all(map(torch.equal, got, backward(operations, of, given, mean, var, True, "relu6", True)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 40, 0), (2, 0, 4), (0, 5)])
def test_empty_tensors(shape, layout):
    of = inputs(shape, torch.float32, layout)
    zeros = torch.zeros(shape[:2], device=DEVICE)
    assert torch.equal(operations.channel_scores(of["x"], of["dy"]), zeros)
    for training in (True, False):
        made = forward(operations, of, training, "relu6", True)
        y, mean, var, mask = made
        assert y.shape == mask.shape == shape
        for got, expected in zip(made, forward(reference, of, training, "relu6", True), strict=True):
            assert torch.equal(got, expected)
        dx, _, dweight, dbias, s = backward(operations, of, mask, mean, var, training, "relu6", False)
        assert dx.shape == shape
        assert torch.equal(s, zeros)
        assert torch.equal(dweight, zeros.sum(0))
        assert torch.equal(dbias, zeros.sum(0))


def test_nan_and_infinity_are_not_hidden():
    x = normal((2, 3, 8, 8), 1).to(DEVICE)
    x[1, 2, 3, 4] = torch.nan
    y, mean, *_ = operations.batch_norm_act(x, None, None, None, None, None, True, EPS, "relu", 0.0)
    assert mean.isnan().tolist() == [False, False, True]
    assert bool(y[:, 2].isnan().all()) and not bool(y[:, :2].isnan().any())
    s = operations.channel_scores(x, torch.ones_like(x))
    assert int(s.isnan().sum()) == 1
    x[1, 2, 3, 4] = torch.inf
    assert operations.channel_scores(x, torch.ones_like(x))[1, 2] == torch.inf


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, 1])
@pytest.mark.parametrize("C", [1, 37, 600])
def test_running_statistics_follow_as_torchs_would(C, momentum):
    mean, var = normal((C,), 1).to(DEVICE), normal((C,), 2).abs().to(DEVICE)
    runs = [[normal((C,), 3).to(DEVICE), normal((C,), 4).abs().to(DEVICE)] for _ in range(2)]
    assert operations.follows(*runs[0], mean, var)
    for backend, running in zip((operations, reference), runs, strict=True):
        backend.follow(*running, mean, var, momentum, 12 / 11)
    for got, expected in zip(*runs, strict=True):
        assert distance(got, expected) <= torch.finfo(torch.float32).eps
        assert got._version == 0


def test_other_running_statistics_are_the_references():
    mean, var = normal((6,), 1).to(DEVICE), normal((6,), 2).to(DEVICE)
    others = (mean.bfloat16(), mean.double(), torch.ones(12, device=DEVICE)[::2], torch.ones(5, device=DEVICE))
    for running in (*others, torch.ones(6, device="meta")):
        assert not operations.follows(running, var, mean, var)
        assert not operations.follows(mean, running, mean, var)
    assert not operations.follows(mean.double(), var.double(), mean.double(), var.double())


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "hardswish"])
def test_activations_are_torchs_own_at_the_kinks_and_far_out(name):
    """y = act(x·1 + 0) and its gradient: at kinks, infinities, NaN, and where e^x leaves the dtype's range."""
    far = [-torch.inf, -800.0, -90.0, -88.0, -87.0, 87.0, 88.0, 90.0, 800.0, torch.inf, torch.nan]
    values = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0, *far, *torch.linspace(-20, 20, 401).tolist()], device=DEVICE)
    x = values.reshape(1, -1, 1, 1).clone().requires_grad_()
    zero, one = torch.zeros_like(values), torch.ones_like(values)
    slope = (SLOPE,) if name == "leaky_relu" else ()
    expected = getattr(torch.nn.functional, name)(x, *slope)
    (gradient,) = torch.autograd.grad(expected, x, torch.full_like(x, 3.0))
    with torch.no_grad():
        y, *_ = operations.batch_norm_act(x, None, one, zero, zero, one, False, 0.0, name, SLOPE)
        dx, *_ = operations.batch_norm_act_backward(
            torch.full_like(x, 3.0), x, None, one, zero, zero, one, False, 0.0, name, SLOPE, False
        )
    # a fast e^x is as exact as its exponent, which counts for nothing where 1 is added
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(y, expected.detach(), rtol=4 * eps, atol=eps, equal_nan=True)
    finite = x.detach().isfinite()  # beyond, torch's gradients are limits or NaN, as its version has it
    torch.testing.assert_close(dx[finite], gradient[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.1, 0.0, -0.2])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_masks_are_torchs_own_at_the_kinks(name, slope, layout):
    """y = act(0 + residual): at kinks, next to them, at infinities and NaN."""
    tiny, eps = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).eps
    kinks = [-0.0, 0.0, tiny, -tiny, 6.0, 6 * (1 - eps), 6 * (1 + eps), 3.0, -3.0, torch.inf, -torch.inf, torch.nan]
    values = torch.tensor((kinks * 3)[:35], device=DEVICE)
    residual = values.reshape(1, -1, 1).repeat(1, 1, 7).requires_grad_()
    x, dy = torch.zeros_like(residual), torch.full_like(residual, 3.0)
    zero, one = torch.zeros_like(values), torch.ones_like(values)
    expected = getattr(torch.nn.functional, name)(residual, *([slope] if name == "leaky_relu" else []))
    (gradient,) = torch.autograd.grad(expected, residual, dy)
    of = [in_layout(t, layout) for t in (x, residual.detach())]
    made = operations.batch_norm_act(*of, one, zero, zero, one, False, 0.0, name, slope)
    y, given = made[0], told(made, name, True)
    _, dresidual, *_ = operations.batch_norm_act_backward(
        dy, of[0], given, one, zero, zero, one, False, 0.0, name, slope, True
    )
    torch.testing.assert_close(y, expected.detach(), equal_nan=True, rtol=0, atol=0, check_stride=False)
    number = ~residual.isnan().detach()  # at a NaN torch's relu6 is not of one mind with its relu
    torch.testing.assert_close(dresidual[number], gradient[number], rtol=0, atol=0)
    if name != "relu":  # which does without a mask
        assert torch.equal(given[number], gradient[number] == 3.0)
    assert bool(((dresidual[~number] == 3.0) == (name != "leaky_relu")).all())


def test_masks_of_any_bool_are_read():
    """A mask from elsewhere may hold other bytes than 1."""
    of = inputs((3, 18, 6, 5), torch.float32)
    y, mean, var, mask = forward(operations, of, True, "relu6", True)
    other = (mask.to(torch.uint8) * 254).view(torch.bool)
    for a, b in zip(*(backward(operations, of, m, mean, var, True, "relu6", True) for m in (mask, other)), strict=True):
        assert torch.equal(a, b)
    # relu takes a mask as well as its y
    for a, b in zip(*(backward(operations, of, m, mean, var, True, "relu", True) for m in (y, y > 0)), strict=True):
        assert distance(a, b) <= (0 if DEVICE == "cpu" else SUMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_round_to_nearest_even_like_torch(dtype):
    """Through y = x·1 + 0: many bit patterns between two neighbours, the largest, infinities and NaN."""
    patterns = torch.arange(0x3F800000, 0x3F830000, 0x0321, dtype=torch.int32).view(torch.float32)
    halfway = torch.tensor([0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000], dtype=torch.int32).view(torch.float32)
    bias = torch.cat([patterns, halfway, torch.tensor([torch.nan, -0.0, 65504.0, 3.4e38, torch.inf])]).to(DEVICE)
    x = torch.zeros(1, len(bias), 2, 2, dtype=dtype, device=DEVICE)
    zero, one = torch.zeros_like(bias), torch.ones_like(bias)
    y, *_ = operations.batch_norm_act(x, None, one, bias, zero, one, False, 0.0, "none", 0.0)
    expected = bias.to(dtype)
    assert torch.equal(y[0, :, 1, 1].isnan(), expected.isnan())
    assert torch.equal(y[0, :, 1, 1].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("tensor", "served"),
    [
        (torch.ones(2, 3, device=DEVICE), True),
        (torch.ones(2, 3, 4, dtype=torch.bfloat16, device=DEVICE), True),
        (torch.ones(2, 3, dtype=torch.float16, device=DEVICE), True),
        (torch.ones(2, 3, dtype=torch.float64, device=DEVICE), False),
        (torch.ones(2, 3, dtype=torch.int32, device=DEVICE), False),
        (torch.ones(3, device=DEVICE), False),
        (torch.ones(2, 3, device=DEVICE).to_sparse(), False),
    ],
)
def test_support_table(tensor, served):
    assert operations.supports("channel_scores", tensor) is served
    assert operations.supports("no such operation", tensor) is False


def test_inputs_are_checked():
    x, C = torch.ones(2, 3, 4, 4, device=DEVICE), torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match="residual has shape"):
        operations.batch_norm_act(x, x[:1], C, C, C, C, False, EPS, "none", 0.0)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        operations.batch_norm_act(x, None, torch.ones(4, device=DEVICE), C, C, C, False, EPS, "none", 0.0)


def test_one_warning_where_kernels_do_not_run(monkeypatch):
    def fails(*_):
        raise RuntimeError("failed to find C compiler")

    monkeypatch.setattr(operations, "_found", {})
    monkeypatch.setattr(operations, "_try", fails)
    x = torch.ones(2, 3, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="Triton's kernels don't run on .*failed to find C compiler"):
        assert not operations.supports("channel_scores", x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not operations.supports("channel_scores", x)
    assert not operations.follows(*[torch.ones(3, device=DEVICE)] * 4)


def test_without_triton_nothing_is_served_and_nothing_is_said(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(operations, "_found", {})
    monkeypatch.setattr(operations, "kernels", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not operations.supports("channel_scores", torch.ones(2, 3, device=DEVICE))


def test_importing_and_asking_for_the_status_import_no_kernels():
    """torch itself may have imported triton."""
    program = (
        "import sys, taylorkern.backends.triton_operations as t; t.status(); "
        "assert not [m for m in sys.modules if m.startswith('taylorkern.backends.triton_f')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
