"""The CUDA kernels, run by the emulator of tests/cuda, against the float64 reference.

Over dtypes, layouts, shapes, addresses, orders of threads and blocks, and sizes of what stays resident.
"""

import ctypes
import itertools

import pytest
import torch

from taylorkern.backends import frame, reference
from tests import emulated
from tests.agreement import (
    ELEMENTS,
    EPS,
    EVERY,
    MORE_SHAPES,
    SLOPE,
    SUMS,
    VIEWS,
    backward,
    batch_norm_inputs,
    check_backward,
    check_channel_scores,
    check_forward,
    forward,
    told,
    two_pass,
    wide,
)
from tests.cases import LAYOUTS, SHAPES, distance, in_layout, normal

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no g++ on PATH")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kernels = emulated.Provider()


@pytest.fixture(autouse=True)
def compiled(poisoned):
    emulated.library()


def same(got, expected) -> bool:
    return all(map(torch.equal, got, expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_channel_scores_agree_with_float64(shape, dtype, layout):
    check_channel_scores(kernels, normal(shape, 1, dtype, layout), normal(shape, 2, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_batch_norm_agrees_with_float64(shape, dtype, layout):
    check_forward(kernels, batch_norm_inputs(shape, dtype, layout), EVERY)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MORE_SHAPES)
def test_batch_norm_backward_agrees_with_float64(shape, dtype, layout):
    check_backward(kernels, batch_norm_inputs(shape, dtype, layout), EVERY)


def everything(provider, of):
    """All outputs of all operations, with act' from y, from a mask, and from x."""
    made = {activation: forward(provider, of, True, activation, True) for activation in ("relu", "relu6")}
    plain = forward(provider, of, True, "silu", False)
    return [
        provider.channel_scores(of["x"], of["dy"]),
        *(t for outputs in made.values() for t in outputs),
        *plain,
        *backward(provider, of, None, *plain[1:3], True, "silu", False),
        *(
            t
            for activation, outputs in made.items()
            for t in backward(provider, of, told(outputs, activation, True), *outputs[1:3], True, activation, True)
        ),
    ]


def launches(run) -> int:
    before = emulated.library().controls.emulator_launches()
    run()
    return emulated.library().controls.emulator_launches() - before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 257, 9, 7), (2, 136, 16, 33), (130, 72, 3), (2, 3, 60, 70), (1, 1, 7001)])
def test_bits_do_not_depend_on_the_order_of_threads_and_blocks_nor_on_what_is_resident(shape, dtype, layout):
    of = batch_norm_inputs(shape, dtype, layout)
    first = everything(kernels, of)
    for order, resident_bytes in [(1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (0, 1 << 40)]:
        assert same(everything(emulated.Provider(resident_bytes, order), of), first), (order, resident_bytes)
    total = of["x"].numel() * of["x"].element_size()
    for part, order in itertools.product((2, 3, 8), (0, 1, 5)):
        assert same(everything(emulated.Provider(3 * total // part, order), of), first), (part, order)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_are_taken_in_waves_where_they_do_not_fit(layout):
    of = batch_norm_inputs((5, 257, 9, 7), torch.float32, layout)
    total = of["x"].numel() * of["x"].element_size()

    def count(resident_bytes):
        return launches(lambda: forward(emulated.Provider(resident_bytes), of, True, "relu", False))

    assert count(0) == count(2 * total) < 2 * count(0) <= count(total // 2) < count(total // 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 5, 33, 31), (2, 40, 7, 7), (400, 19), (1, 3, 70001)])
def test_statistics_survive_a_large_mean(shape, layout):
    """Raw sums of squares would lose every digit here."""
    offset = 1e4
    x = (in_layout(normal(shape, 1, torch.float64), layout) + offset).float()
    _, mean, var, _ = kernels.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    exact_mean, exact_var = two_pass(x.double() - offset)
    assert distance(mean, exact_mean + offset) < torch.finfo(torch.float32).eps
    assert distance(var, exact_var) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.1, 1e6, -3e-5])
def test_statistics_of_a_constant_are_exact(value, layout):
    x = in_layout(torch.full((3, 5, 37, 29), value), layout)
    _, mean, var, _ = kernels.batch_norm_act(x, None, None, None, None, None, True, EPS, "none", 0.0)
    assert torch.equal(mean, torch.full((5,), value))
    assert torch.equal(var, torch.zeros(5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 40, 0), (2, 0, 4), (0, 5)])
def test_empty_tensors(shape, layout):
    of = batch_norm_inputs(shape, torch.float32, layout)
    assert torch.equal(kernels.channel_scores(of["x"], of["dy"]), torch.zeros(shape[:2]))
    y, mean, var, mask = forward(kernels, of, False, "relu6", True)
    assert y.shape == mask.shape == shape
    assert torch.equal(mean, of["mean"])
    dx, _, dweight, dbias, s = backward(kernels, of, mask, mean, var, True, "relu6", False)
    assert dx.shape == shape
    assert torch.equal(s, torch.zeros(shape[:2]))
    assert torch.equal(dweight, torch.zeros(shape[1]))
    assert torch.equal(dbias, torch.zeros(shape[1]))
    _, mean, var, _ = forward(kernels, of, True, "relu", False)
    assert torch.equal(mean, torch.zeros(shape[1]))
    assert torch.equal(var, torch.zeros(shape[1]))


def test_the_workspace_suffices_whatever_the_width_of_an_access():
    """Of this shape wide accesses leave more sums than narrow ones do; guards behind the workspace are looked at."""
    a = normal((1000, 64, 59), 1)
    assert distance(kernels.channel_scores(a, a), (a.double() ** 2).sum(2)) < 1e-5
    _, mean, var, _ = kernels.batch_norm_act(a, None, None, None, None, None, True, 1e-5, "none", 0.0)
    exact = two_pass(a)
    assert distance(mean, exact[0]) < 1e-5 and distance(var, exact[1]) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address_of_an_element_will_do(dtype, layout):
    """Each tensor in turn, and all of them, begin one element behind what 16 bytes are aligned to."""
    of = batch_norm_inputs((3, 24, 6, 5), dtype, layout)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)
        view = memory[1:].view(t.movedim(1, -1).shape if layout == "channels_last" else t.shape)
        view = view.movedim(-1, 1) if layout == "channels_last" else view
        assert view.stride() == t.stride() and view.data_ptr() % 16
        return view.copy_(t)

    names = ("x", "dy", "residual")
    for chosen in (*((name,) for name in names), names):
        moved = of | {name: shifted(of[name]) for name in chosen}
        s, expected = (p.channel_scores(o["x"], o["dy"]) for p, o in ((kernels, moved), (reference, of)))
        assert distance(s, expected) < 20 * SUMS[dtype]
        for activation in ("relu", "relu6"):
            made = forward(kernels, moved, False, activation, True)
            expected = forward(reference, of, False, activation, True, cast=wide)
            for got, want in zip(made, expected, strict=True):
                assert distance(got, want) < ELEMENTS[dtype]
            mean, var, given = *made[1:3], told(made, activation, True)
            for told_by in (given, shifted(given)):
                got = backward(kernels, moved, told_by, mean, var, True, activation, True)
                want = backward(reference, of, given, mean, var, True, activation, True, cast=wide)
                for a, b in zip(got, want, strict=True):
                    assert distance(a, b) < 4 * ELEMENTS[dtype]


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    of = batch_norm_inputs((3, 18, 6, 5), torch.float32, "contiguous")
    for name in ("x", "dy", "residual"):
        of[name] = view(of[name])
    C = of["x"].shape[1]
    for name in ("weight", "bias", "mean", "var"):
        of[name] = of[name].repeat_interleave(2)[::2][:C]
    kept = {name: t.clone() for name, t in of.items()}
    made = forward(kernels, of, True, "relu6", True)
    mean, var, given = *made[1:3], told(made, "relu6", True)
    for got, expected in zip(made, forward(reference, of, True, "relu6", True), strict=True):
        assert got.stride() == expected.stride()
        assert distance(got, expected) < 2e-6
    got = backward(kernels, of, given, mean, var, True, "relu6", True)
    for a, b in zip(got, backward(reference, of, given, mean, var, True, "relu6", True), strict=True):
        assert distance(a, b) < 2e-5
    for name, t in of.items():
        assert torch.equal(t, kept[name]), f"{name} was written to"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [37, 40])
def test_recomputed_mask_is_the_forwards_own(C, dtype, layout):
    """dz seen through dbias and dresidual: act' from x is what the forward tells, bit for bit, next to kinks too."""
    of = batch_norm_inputs((4, C, 23, 3), dtype, layout)
    of["bias"].zero_()
    of["x"] = (of["x"] * 4).round() / 4  # many values that are their channel's mean, or nearly
    of["mean"] = (of["mean"] * 4).round() / 4
    of["residual"].zero_()
    of["weight"] *= 8
    for training, activation in itertools.product((True, False), ("relu", "relu6", "leaky_relu")):
        made = forward(kernels, of, training, activation, True)
        mean, var, given = *made[1:3], told(made, activation, True)
        if dtype is torch.float16 and activation == "relu":
            # some z above 0 are smaller than any float16, so that y can't tell; leaky_relu's mask is of the same z
            given = forward(kernels, of, training, "leaky_relu", True)[3]
        from_x = backward(kernels, of, None, mean, var, training, activation, True)
        from_given = backward(kernels, of, given, mean, var, training, activation, True)
        assert 0.2 < float((given > 0).double().mean()) < 0.8
        assert same(from_x, from_given), (training, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 64, 14, 14), (8, 16, 7, 7), (2, 3, 5, 5), (6, 33)])
def test_the_forward_is_torchs_own_where_the_statistics_are(shape, dtype, layout):
    of = batch_norm_inputs(shape, dtype, layout)
    arguments = (of["x"], of["mean"], of["var"], of["weight"], of["bias"], False, 0.0, EPS)
    got, want = forward(kernels, of, False, "none", False)[0], torch.nn.functional.batch_norm(*arguments)
    assert distance(got, want) < 2 * ELEMENTS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [7, 16])
def test_missing_affine_is_one_and_zero(C, dtype):
    of = batch_norm_inputs((3, C, 5, 5), dtype, "channels_last")
    ones = of | {"weight": torch.ones(C), "bias": torch.zeros(C)}
    none = of | {"weight": None, "bias": None}
    made = forward(kernels, ones, True, "relu", True)
    assert same(forward(kernels, none, True, "relu", True), made)
    given, mean, var = told(made, "relu", True), *made[1:3]
    with_ones = backward(kernels, ones, given, mean, var, True, "relu", False)
    assert same(backward(kernels, none, given, mean, var, True, "relu", False), with_ones)


def test_masks_of_any_bool_are_read():
    """A mask from elsewhere may hold other bytes than 1."""
    of = batch_norm_inputs((3, 18, 6, 5), torch.float32, "contiguous")
    y, mean, var, mask = forward(kernels, of, True, "relu6", True)
    other = (mask.to(torch.uint8) * 254).view(torch.bool)
    assert same(*(backward(kernels, of, m, mean, var, True, "relu6", True) for m in (mask, other)))
    # relu takes a mask as well as its y
    assert same(*(backward(kernels, of, m, mean, var, True, "relu", True) for m in (y, y > 0)))


def test_nan_and_infinity_are_not_hidden():
    x = normal((2, 3, 8, 8), 1)
    x[1, 2, 3, 4] = torch.nan
    y, mean, *_ = kernels.batch_norm_act(x, None, None, None, None, None, True, EPS, "relu", 0.0)
    assert torch.equal(mean.isnan(), torch.tensor([False, False, True]))
    assert bool(y[:, 2].isnan().all())
    s = kernels.channel_scores(x, torch.ones_like(x))
    assert int(s.isnan().sum()) == 1
    x[1, 2, 3, 4] = torch.inf
    assert kernels.channel_scores(x, torch.ones_like(x))[1, 2] == torch.inf


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "hardswish"])
def test_activations_are_torchs_own_at_the_kinks_and_far_out(name, layout):
    """y = act(x·1 + 0) and its gradient: at kinks, infinities, NaN, and where e^x leaves the dtype's range."""
    far = [-torch.inf, -800.0, -90.0, -88.0, -87.0, 87.0, 88.0, 90.0, 800.0, torch.inf, torch.nan]
    values = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0, *far, *torch.linspace(-20, 20, 400).tolist()])
    x = in_layout(values.reshape(1, -1, 1, 1).repeat(1, 1, 2, 2), layout).requires_grad_()
    zero, one = torch.zeros(len(values)), torch.ones(len(values))
    slope = (SLOPE,) if name == "leaky_relu" else ()
    expected = getattr(torch.nn.functional, name)(x, *slope)
    (gradient,) = torch.autograd.grad(expected, x, torch.full_like(x, 3.0))
    with torch.no_grad():
        y, *_ = kernels.batch_norm_act(x, None, one, zero, zero, one, False, 0.0, name, SLOPE)
        dy = torch.full_like(x, 3.0)
        dx, *_ = kernels.batch_norm_act_backward(dy, x, None, one, zero, zero, one, False, 0.0, name, SLOPE, False)
    bound = {"rtol": 4 * torch.finfo(torch.float32).eps, "atol": 1e-30, "equal_nan": True}
    torch.testing.assert_close(y, expected.detach(), **bound)
    finite = x.detach().isfinite()  # beyond, torch's gradients are limits or NaN, as its version has it
    torch.testing.assert_close(dx[finite], gradient[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("C", [1, 37, 1000])
def test_running_statistics_follow_as_torchs_would(C, momentum):
    mean, var = normal((C,), 1), normal((C,), 2).abs()
    runs = [[normal((C,), 3), normal((C,), 4).abs()] for _ in range(2)]
    for backend, running in zip((kernels, reference), runs, strict=True):
        backend.follow(*running, mean, var, momentum, 12 / 11)
    for got, expected in zip(*runs, strict=True):
        assert distance(got, expected) <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_tensors_are_streamed(layout):
    """Beyond 64 MiB outputs are written past the caches, by other instructions."""
    of = batch_norm_inputs((2, 256, 182, 183), torch.float32, layout)
    made = forward(kernels, of, False, "relu", False)
    assert distance(made[0], forward(reference, of, False, "relu", False)[0]) < 1e-6


def converted(name, values, dtype):
    made = torch.empty(len(values), dtype=dtype)
    function = getattr(emulated.library().controls, f"emulator_{name}")
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (values, made)), ctypes.c_int64(len(values)))
    return made


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_emulators_conversions_are_torchs(name, dtype):
    narrow = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(dtype)
    widened = converted(f"from_{name}", narrow, torch.float32)
    assert torch.equal(widened.isnan(), narrow.isnan())
    assert torch.equal(widened.nan_to_num(0.0).view(torch.int32), narrow.float().nan_to_num(0.0).view(torch.int32))
    # every number of the narrow type, what is half way to the next, and what is just beside that; and any bits
    bits = narrow.float().view(torch.int32)
    step = 1 << (12 if dtype is torch.float16 else 15)
    beside = [bits + d for d in (0, -1, 1, step - 1, step, step + 1)]
    anything = torch.arange(-(1 << 31), (1 << 31) - 1, 4099).int()
    small = torch.arange(0, 1 << 28, 1021).int() + 0x30000000  # around where half becomes subnormal
    values = torch.cat([*beside, anything, small, -small]).view(torch.float32)
    got, expected = converted(f"to_{name}", values, dtype), values.to(dtype)
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


def test_what_the_kernels_refuse():
    module, codes = emulated.library().module, frame.DTYPES
    with pytest.raises(ValueError, match="float64"):
        module.workspace_bytes(1, 1, 1, 0, codes[torch.float64])
    with pytest.raises(ValueError, match="null pointer for a"):
        module.channel_scores(0, 0, 0, 1, 1, 1, 0, 0, 0, 16, 0)
    with pytest.raises(ValueError, match="16 bytes"):
        module.channel_scores(16, 16, 16, 1, 1, 1, 0, 0, 0, 8, 0)
