"""The C++ kernels against the float64 reference, over dtypes, layouts, shapes and numbers of threads."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch

from taylorkern.backends import native, reference
from tests.agreement import (
    ELEMENTS,
    EPS,
    EVERY,
    MORE_SHAPES,
    SLOPE,
    VIEWS,
    backward,
    batch_norm_inputs,
    check_backward,
    check_channel_scores,
    check_forward,
    forward,
    told,
    two_pass,
)
from tests.cases import LAYOUTS, SHAPES, distance, in_layout, normal

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels_are_there(poisoned):
    assert native.supports("channel_scores", torch.ones(1, 1)), native.status().reason


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_channel_scores_agree_with_float64(shape, dtype, layout):
    check_channel_scores(native, normal(shape, 1, dtype, layout), normal(shape, 2, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_batch_norm_agrees_with_float64(shape, dtype, layout):
    check_forward(native, batch_norm_inputs(shape, dtype, layout), EVERY)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_batch_norm_backward_agrees_with_float64(shape, dtype, layout):
    check_backward(native, batch_norm_inputs(shape, dtype, layout), EVERY)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "offset", "bound"),
    [
        (torch.float32, 1e4, 1e-6),  # the sums over chunks are in double: nothing is lost
        (
            torch.float64,
            1e8,
            2e-8,
        ),  # a chunk's mean is rounded to double: at most offset / std more than a unit is lost
    ],
)
@pytest.mark.parametrize("shape", [(8, 5, 33, 31), (2, 40, 7, 7), (400, 19), (1, 3, 70001)])
def test_statistics_survive_a_large_mean(shape, dtype, offset, bound, layout):
    """Raw sums of squares would lose every digit here."""
    x = (in_layout(normal(shape, 1, torch.float64), layout) + offset).to(dtype)
    _, mean, var, _ = native.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    exact_mean, exact_var = two_pass(x.double() - offset)
    assert distance(mean, exact_mean + offset) < torch.finfo(dtype).eps
    assert distance(var, exact_var) < bound


def test_statistics_of_a_constant_are_exact():
    x = torch.full((3, 5, 7, 9), 0.1)
    _, mean, var, _ = native.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    assert torch.equal(mean, torch.full((5,), 0.1))
    assert bool((var >= 0).all())
    assert float(var.max()) < 1e-15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 33, 13, 11), (1, 64, 56, 56), (130, 31, 3), (3, 500, 5, 5), (1, 1, 70001)])
def test_bits_do_not_depend_on_threads_or_repetition(shape, layout):
    def everything():
        of = batch_norm_inputs(shape, torch.float32, layout)
        relu, relu6 = (forward(native, of, True, activation, True) for activation in ("relu", "relu6"))
        return [
            native.channel_scores(of["x"], of["dy"]),
            *relu,
            *relu6,
            *backward(native, of, told(relu, "relu", True), *relu[1:3], True, "relu", True),
            *backward(native, of, told(relu6, "relu6", True), *relu6[1:3], True, "relu6", True),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for got, expected in zip(everything(), first, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_mask_is_the_forwards_own(dtype, layout):
    """dz seen through dbias and dresidual: act' from x is what the forward tells, bit for bit, next to kinks too."""
    shape = (4, 37, 23, 3)
    of = batch_norm_inputs(shape, dtype, layout)
    of["bias"].zero_()
    of["x"] = (of["x"] * 4).round() / 4  # many values that are their channel's mean, or nearly
    of["mean"] = (of["mean"] * 4).round() / 4
    of["residual"].zero_()
    of["weight"] *= 8
    for training, activation in itertools.product((True, False), ("relu", "relu6", "leaky_relu")):
        made = forward(native, of, training, activation, True)
        mean, var, given = *made[1:3], told(made, activation, True)
        from_x = backward(native, of, None, mean, var, training, activation, True)
        from_given = backward(native, of, given, mean, var, training, activation, True)
        assert 0.2 < float((given > 0).double().mean()) < 0.8
        for a, b in zip(from_x, from_given, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64, 14, 14), (8, 16, 7, 7), (2, 3, 5, 5), (6, 33)])
def test_the_forward_is_torchs_own_where_the_statistics_are(shape, dtype, layout):
    """Bit for bit, with processors that round a*b + c once; elsewhere within a unit."""
    of = batch_norm_inputs(shape, dtype, layout)
    arguments = (of["x"], of["mean"], of["var"], of["weight"], of["bias"], False, 0.0, EPS)
    got, want = forward(native, of, False, "none", False)[0], torch.nn.functional.batch_norm(*arguments)
    if "fused multiply-add" in native.status().detail["vectors"]:
        assert torch.equal(got, want)
    assert distance(got, want) < 2 * ELEMENTS[dtype]


def test_missing_affine_is_one_and_zero():
    of = batch_norm_inputs((3, 7, 5, 5), torch.float32, "contiguous")
    ones = of | {"weight": torch.ones(7), "bias": torch.zeros(7)}
    none = of | {"weight": None, "bias": None}
    made = forward(native, ones, True, "relu", True)
    for got, expected in zip(forward(native, none, True, "relu", True), made, strict=True):
        assert torch.equal(got, expected)
    mask, mean, var = told(made, "relu", True), *made[1:3]
    with_ones = backward(native, ones, mask, mean, var, True, "relu", False)
    for got, expected in zip(backward(native, none, mask, mean, var, True, "relu", False), with_ones, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    of = batch_norm_inputs((3, 18, 6, 5), torch.float64, "contiguous")
    for name in ("x", "dy", "residual"):
        of[name] = view(of[name])
    C = of["x"].shape[1]
    for name in ("weight", "bias", "mean", "var"):
        of[name] = of[name].repeat_interleave(2)[::2][:C]
    kept = {name: t.clone() for name, t in of.items()}
    s = native.channel_scores(of["x"], of["dy"])
    assert distance(s, reference.channel_scores(of["x"], of["dy"])) < 1e-13
    for activation in ("relu", "relu6"):
        made = forward(native, of, True, activation, True)
        mean, var, given = *made[1:3], told(made, activation, True)
        for got, expected in zip(made, forward(reference, of, True, activation, True), strict=True):
            assert got.stride() == expected.stride()
            assert distance(got, expected) < 1e-13
        got = backward(native, of, given, mean, var, True, activation, True)
        for a, b in zip(got, backward(reference, of, given, mean, var, True, activation, True), strict=True):
            assert distance(a, b) < 1e-12
    for name, t in of.items():
        assert torch.equal(t, kept[name]), f"{name} was written to"


def test_layouts_may_differ_between_arguments():
    of = batch_norm_inputs((3, 18, 6, 5), torch.float64, "channels_last")
    mixed = of | {name: of[name].contiguous() for name in ("dy", "residual")}
    for activation in ("relu", "relu6"):
        made = forward(native, mixed, True, activation, True)
        mean, var, given = *made[1:3], told(made, activation, True)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (made[0], given))
        assert all(map(torch.equal, made, forward(native, of, True, activation, True)))
        got = backward(native, mixed, given.contiguous(), mean, var, True, activation, True)
        for a, b in zip(got, backward(native, of, given, mean, var, True, activation, True), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(native.channel_scores(of["x"], mixed["dy"]), native.channel_scores(of["x"], of["dy"]))


def test_tokens_last_are_channels_last():
    """[N, T, C], transposed to [N, C, T], is served without a copy."""
    tokens = normal((4, 19, 33), 1)
    x = tokens.transpose(1, 2)
    y, *_ = native.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    assert y.transpose(1, 2).is_contiguous()
    assert distance(native.channel_scores(x, y), (tokens * y.transpose(1, 2)).sum(1)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 40, 0), (2, 0, 4), (0, 5)])
def test_empty_tensors(shape, layout):
    of = batch_norm_inputs(shape, torch.float32, layout)
    assert torch.equal(native.channel_scores(of["x"], of["dy"]), torch.zeros(shape[:2]))
    y, mean, var, mask = forward(native, of, False, "relu6", True)
    assert y.shape == mask.shape == shape
    assert torch.equal(mean, of["mean"])
    dx, _, dweight, dbias, s = backward(native, of, mask, mean, var, True, "relu6", False)
    assert dx.shape == shape
    assert torch.equal(s, torch.zeros(shape[:2]))
    assert torch.equal(dweight, torch.zeros(shape[1]))
    assert torch.equal(dbias, torch.zeros(shape[1]))


def test_nan_and_infinity_are_not_hidden():
    x = normal((2, 3, 8, 8), 1)
    x[1, 2, 3, 4] = torch.nan
    y, mean, *_ = native.batch_norm_act(x, None, None, None, None, None, True, EPS, "relu", 0.0)
    assert torch.equal(mean.isnan(), torch.tensor([False, False, True]))
    assert bool(y[:, 2].isnan().all())
    s = native.channel_scores(x, torch.ones_like(x))
    assert int(s.isnan().sum()) == 1
    x[1, 2, 3, 4] = torch.inf
    assert native.channel_scores(x, torch.ones_like(x))[1, 2] == torch.inf


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_follow_as_torchs_would(dtype, momentum):
    mean, var = normal((37,), 1, dtype), normal((37,), 2, dtype).abs()
    runs = [[normal((37,), 3, dtype), normal((37,), 4, dtype).abs()] for _ in range(2)]
    assert native.follows(*runs[0], mean, var)
    for backend, running in zip((native, reference), runs, strict=True):
        backend.follow(*running, mean, var, momentum, 12 / 11)
    for got, expected in zip(*runs, strict=True):
        assert distance(got, expected) <= torch.finfo(dtype).eps  # torch's lerp may use a fused multiply-add
        assert got._version == 0


def test_other_running_statistics_are_the_references():
    mean, var = normal((6,), 1), normal((6,), 2)
    for running in (mean.bfloat16(), torch.ones(12)[::2], torch.ones(5), torch.ones(6, device="meta")):
        assert not native.follows(running, var, mean, var)
        assert not native.follows(mean, running, mean, var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "hardswish"])
def test_activations_are_torchs_own_at_the_kinks_and_far_out(name, dtype):
    """y = act(x·1 + 0) and its gradient: at kinks, infinities, NaN, and where e^x leaves the dtype's range."""
    far = [-torch.inf, -800.0, -90.0, -88.0, -87.0, 87.0, 88.0, 90.0, 800.0, torch.inf, torch.nan]
    values = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0, *far, *torch.linspace(-20, 20, 401).tolist()], dtype=dtype)
    x = values.reshape(1, -1, 1, 1).clone().requires_grad_()
    zero, one = torch.zeros(len(values), dtype=dtype), torch.ones(len(values), dtype=dtype)
    slope = (SLOPE,) if name == "leaky_relu" else ()
    expected = getattr(torch.nn.functional, name)(x, *slope)
    (gradient,) = torch.autograd.grad(expected, x, torch.full_like(x, 3.0))
    with torch.no_grad():
        y, *_ = native.batch_norm_act(x, None, one, zero, zero, one, False, 0.0, name, SLOPE)
        dx, *_ = native.batch_norm_act_backward(
            torch.full_like(x, 3.0), x, None, one, zero, zero, one, False, 0.0, name, SLOPE, False
        )
    bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-30, "equal_nan": True}
    torch.testing.assert_close(y, expected.detach(), **bound)
    finite = x.detach().isfinite()  # beyond, torch's gradients are limits or NaN, as its version has it
    torch.testing.assert_close(dx[finite], gradient[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", [native, reference])
@pytest.mark.parametrize("slope", [0.1, 0.0, -0.2])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_masks_are_torchs_own_at_the_kinks(name, slope, backend, dtype):
    """y = act(0 + residual): at kinks, next to them, at infinities and NaN, in registers of every width."""
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    kinks = [-0.0, 0.0, tiny, -tiny, 6.0, 6 * (1 - eps), 6 * (1 + eps), 3.0, -3.0, torch.inf, -torch.inf, torch.nan]
    values = torch.tensor((kinks * 3)[:35], dtype=dtype)
    residual = values.reshape(1, -1, 1).repeat(1, 1, 7).requires_grad_()
    x, dy = torch.zeros_like(residual), torch.full_like(residual, 3.0)
    zero, one = torch.zeros(len(values), dtype=dtype), torch.ones(len(values), dtype=dtype)
    expected = getattr(torch.nn.functional, name)(residual, *([slope] if name == "leaky_relu" else []))
    (gradient,) = torch.autograd.grad(expected, residual, dy)
    for layout in LAYOUTS:
        of = [in_layout(t, layout) for t in (x, residual.detach())]
        made = backend.batch_norm_act(*of, one, zero, zero, one, False, 0.0, name, slope)
        y, given = made[0], told(made, name, True)
        _, dresidual, *_ = backend.batch_norm_act_backward(
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
    of = batch_norm_inputs((3, 18, 6, 5), torch.float32, "contiguous")
    y, mean, var, mask = forward(native, of, True, "relu6", True)
    other = (mask.to(torch.uint8) * 254).view(torch.bool)
    for a, b in zip(*(backward(native, of, m, mean, var, True, "relu6", True) for m in (mask, other)), strict=True):
        assert torch.equal(a, b)
    # relu takes a mask as well as its y
    for a, b in zip(*(backward(native, of, m, mean, var, True, "relu", True) for m in (y, y > 0)), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_rounds_to_nearest_even_like_torch():
    """Through y = x·1 + 0: every bit pattern between two bf16 neighbours, infinities, subnormals and NaN."""
    values = torch.cat(
        [
            torch.arange(0x3F800000, 0x3F830000, 0x0321, dtype=torch.int32).view(torch.float32),
            torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 1, 0x7F800000], dtype=torch.int32).view(torch.float32),
            torch.tensor([torch.nan, -0.0, 3.4e38]),
        ]
    )
    bias = values.repeat(1, 1).flatten()
    x = torch.zeros(1, len(bias), 2, 2, dtype=torch.bfloat16)
    zero, one = torch.zeros(len(bias)), torch.ones(len(bias))
    y, *_ = native.batch_norm_act(x, None, one, bias, zero, one, False, 0.0, "none", 0.0)
    expected = bias.to(torch.bfloat16)
    assert torch.equal(y[0, :, 1, 1].isnan(), expected.isnan())
    assert torch.equal(y[0, :, 1, 1].nan_to_num(), expected.nan_to_num())


def test_inputs_are_checked_before_they_become_addresses():
    x, C = normal((2, 3, 4, 4), 1), torch.ones(3)
    with pytest.raises(ValueError, match=r"g has shape \(2, 3, 4\)"):
        native._Frame(x).dense("g", normal((2, 3, 4), 1))
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        native.batch_norm_act(x, None, torch.ones(4), C, C, C, False, EPS, "none", 0.0)
    with pytest.raises(ValueError, match="residual has shape"):
        native.batch_norm_act(x, x[:1], C, C, C, C, False, EPS, "none", 0.0)
    with pytest.raises(ValueError, match="running_mean"):
        native.batch_norm_act(x, None, C, C, None, C, False, EPS, "none", 0.0)
    with pytest.raises(ValueError, match="mask has shape"):
        native.batch_norm_act_backward(x, x, x[:1] > 0, C, C, C, C, True, EPS, "relu", 0.0, False)
    with pytest.raises(ValueError, match="mean has shape"):
        native.batch_norm_act_backward(x, x, None, C, C, torch.ones(1), C, True, EPS, "none", 0.0, False)


def test_bindings_refuse_nonsense():
    module = native._kernels()
    with pytest.raises(ValueError, match="null pointer for a"):
        module.channel_scores(0, 0, 0, 1, 1, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="negative"):
        module.channel_scores(0, 0, 0, -1, 1, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="overflow"):
        module.channel_scores(8, 8, 8, 1 << 40, 1 << 40, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="dtype"):
        module.channel_scores(0, 0, 0, 0, 1, 1, 0, 9, 1)
    with pytest.raises(ValueError, match="layout"):
        module.channel_scores(0, 0, 0, 0, 1, 1, 2, 0, 1)


@pytest.mark.parametrize(
    ("tensor", "served"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(2, 3, dtype=torch.bfloat16), True),
        (torch.ones(2, 3, dtype=torch.float16), False),
        (torch.ones(2, 3, device="meta"), False),
        (torch.ones(3), False),
    ],
)
def test_support_table(tensor, served):
    assert native.supports("channel_scores", tensor) is served
    assert native.supports("no such operation", tensor) is False


def test_kernels_use_torchs_own_thread_pool():
    module = native._kernels()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert module.max_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert module.max_threads() == before


def test_other_python_threads_run_while_a_kernel_does():
    a = torch.ones(4, 64, 64, 64)
    results = []
    workers = [threading.Thread(target=lambda: results.append(native.channel_scores(a, a))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(s, torch.full((4, 64), 4096.0)) for s in results)
    assert len(results) == 4


def test_importing_compiles_and_loads_nothing():
    program = "import taylorkern.backends.native as n; assert n._outcome is None; n.status(); assert n._outcome is None"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
