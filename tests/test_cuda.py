"""Every operation by every backend of a GPU, one at a time, against float64; on the CPU the same, of few shapes."""

import itertools
from functools import cache

import pytest
import torch
from torch.library import opcheck

from taylorkern import backends, ops
from taylorkern.autograd import ChannelGate, FusedBatchNormAct
from taylorkern.backends import reference
from tests.agreement import (
    EPS,
    EXACT,
    FORMS,
    MORE_SHAPES,
    SLOPE,
    backward,
    batch_norm_inputs,
    forward,
    told,
    two_pass,
    wide,
)
from tests.cases import LAYOUTS, SHAPES, distance, in_layout, normal
from tests.devices import COMPILED, DEVICES, MARKS, PROVIDERS, captured, forced, needs_gpu, serves, without_waiting

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = 1e-6  # all are summed in float32, and beyond a tile in float64
PLAIN_SUMS = 2e-5  # torch's own, in float32 all the way
ELEMENTS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# The CPU's backends have tests of their own: here it only tries the code.
SHAPES_ON = {"cpu": [(2, 3, 5, 7), (7, 5)], "cuda": SHAPES + MORE_SHAPES if torch.cuda.is_available() else SHAPES[:1]}
# Triton compiles for every shape anew; tests/test_triton.py has more of them.
OF_TRITON = [(2, 3, 5, 7), (2, 64, 8, 8), (3, 257, 9, 9), (300, 40)]
ON_SHAPES = [
    pytest.param(*p.values, shape, marks=p.marks, id=f"{p.id}-{shape}")
    for p in PROVIDERS
    for shape in SHAPES_ON[p.values[0]]
    if p.values[1] is not backends.triton_operations or shape in OF_TRITON
]


@pytest.fixture(autouse=True)
def _poison(poisoned):
    """What a kernel forgets to write is NaN."""


def inputs(shape, dtype, layout, device):
    return {name: t.to(device) for name, t in batch_norm_inputs(shape, dtype, layout).items()}


def on_cpu(of):
    return {name: t.cpu() for name, t in of.items()}


@cache
def expected_forward(shape, dtype, layout, training, activation, residual):
    """In float64, on the CPU."""
    return forward(reference, batch_norm_inputs(shape, dtype, layout), training, activation, residual, cast=wide)


def sums_of(provider):
    return PLAIN_SUMS if provider is reference else SUMS


def everything(provider, of, training=True, activations=("relu", "relu6", "silu")):
    """All that the operations give."""
    found = [provider.channel_scores(of["x"], of["dy"])]
    for activation in activations:
        residual = ops.maskable(activation)
        made = forward(provider, of, training, activation, residual)
        given = told(made, activation, residual)
        found += [*made, *backward(provider, of, given, *made[1:3], training, activation, residual)]
    return found


def equal(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device,provider,shape", ON_SHAPES)
def test_channel_scores_agree_with_float64(device, provider, shape, dtype, layout):
    serves(device, provider, dtype)
    a, g = (normal(shape, seed, dtype, layout) for seed in (1, 2))
    s = provider.channel_scores(a.to(device), g.to(device))
    assert s.dtype == torch.float32 and s.is_contiguous() and s.device.type == device
    size = reference.channel_scores(a.double().abs(), g.double().abs())
    error = (s.cpu().double() - reference.channel_scores(a.double(), g.double())).abs()
    assert bool((error <= sums_of(provider) * size).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device,provider,shape", ON_SHAPES)
def test_batch_norm_agrees_with_float64(device, provider, shape, dtype, layout):
    serves(device, provider, dtype)
    of = inputs(shape, dtype, layout, device)
    sums, x = sums_of(provider), of["x"].cpu()
    for training, (activation, residual) in itertools.product((True, False), FORMS):
        made = forward(provider, of, training, activation, residual)
        assert made[0].dtype == dtype and made[0].stride() == torch.empty_like(of["x"]).stride()
        y, mean, var, mask = (t.cpu() for t in made)
        *expected, passes = expected_forward(shape, dtype, layout, training, activation, residual)
        scale = (of["weight"].cpu().double() / (expected[2] + EPS).sqrt()).abs()
        terms = (x.abs().double().amax() + expected[1].abs()) * scale + of["bias"].cpu().abs()
        size = torch.maximum(terms.max(), expected[0].abs().max())
        assert bool(((y.double() - expected[0]).abs() <= 2 * ELEMENTS[dtype] * size).all()), (training, activation)
        assert mask.dtype == torch.bool and mask.stride() == passes.stride()
        beside = torch.minimum(expected[0].abs(), (expected[0] - 6).abs()) <= 2 * sums * size
        assert bool(((mask == passes) | beside).all()) if mask.numel() else not passes.numel(), (training, activation)
        truth = two_pass(x) if training else expected[1:]
        assert distance(mean, truth[0]) < sums
        assert distance(var, truth[1]) < sums or float(truth[1].max()) == float(var.max()) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device,provider,shape", ON_SHAPES)
def test_batch_norm_backward_agrees_with_float64(device, provider, shape, dtype, layout):
    serves(device, provider, dtype)
    of = inputs(shape, dtype, layout, device)
    here, mean, var = on_cpu(of), of["mean"], of["var"]
    for training, (activation, residual) in itertools.product((True, False), FORMS):
        given = told(forward(provider, of, False, activation, residual), activation, residual)
        dx, *got = backward(provider, of, given, mean, var, training, activation, residual)
        # Where z is computed a residual of zeros decides, so that both are on the same side of a kink.
        if not residual and ops.maskable(activation):
            nothing = of | {"residual": torch.zeros_like(of["x"])}
            given = told(forward(provider, nothing, False, activation, True), activation, True)
        saved = None if given is None else given.cpu()
        want_dx, *expected = backward(
            reference, here, saved, here["mean"], here["var"], training, activation, residual, cast=wide
        )
        form = training, activation, residual
        assert dx.stride() == torch.empty_like(of["x"]).stride() and dx.dtype == dtype, form
        assert distance(dx.cpu(), want_dx) < 4 * ELEMENTS[dtype], form
        dresidual, *found = (t.cpu() for t in got)
        assert distance(dresidual, expected[0]) <= (0 if activation in EXACT else ELEMENTS[dtype]), form
        for a, b in zip(found, expected[1:], strict=True):
            assert distance(a, b) < 20 * sums_of(provider), form


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_a_hundred_runs_give_the_same_bits(device, provider, dtype, layout):
    serves(device, provider, dtype)
    shapes, runs = {"cpu": ([(3, 17, 9, 9)], 3), "cuda": ([(32, 64, 28, 28), (5, 33, 13, 11), (300, 40)], 100)}[device]
    for shape in shapes:
        of = inputs(shape, dtype, layout, device)
        first = everything(provider, of)
        for _ in range(runs - 1):
            assert equal(everything(provider, of), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device,provider", COMPILED)
def test_statistics_survive_a_large_mean(device, provider, layout):
    """Raw sums of squares would lose every digit here."""
    serves(device, provider, torch.float32)
    for shape in [(8, 5, 33, 31), (2, 40, 7, 7), (400, 19)]:
        x = in_layout(normal(shape, 1, torch.float64), layout).add(1e4).float()
        _, mean, var, _ = provider.batch_norm_act(x.to(device), *[None] * 5, True, EPS, "none", 0.0)
        exact_mean, exact_var = two_pass(x.double() - 1e4)
        assert distance(mean.cpu(), exact_mean + 1e4) < 1e-6
        assert distance(var.cpu(), exact_var) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 5, 7, 3)], ids=str)
@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_memory_at_any_multiple_of_an_element(device, provider, shape, dtype):
    """A view that begins an element behind where vectors may be read, of some or of all tensors."""
    serves(device, provider, dtype)
    of = inputs(shape, dtype, "contiguous", device)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return memory[1:].view(t.shape).copy_(t)

    first = everything(provider, of)
    for chosen in [("x",), ("dy",), ("residual",), ("x", "dy", "residual")]:
        moved = of | {name: shifted(of[name]) for name in chosen}
        assert moved[chosen[0]].data_ptr() % 4 == 0 or dtype != torch.float32
        for got, want in zip(everything(provider, moved), first, strict=True):
            assert distance(got, want) < 20 * (ELEMENTS[dtype] if got.dtype == dtype else sums_of(provider))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 40, 0), (2, 0, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_empty_tensors(device, provider, shape, layout):
    serves(device, provider, torch.float32)
    of = inputs(shape, torch.float32, layout, device)
    assert torch.equal(provider.channel_scores(of["x"], of["dy"]).cpu(), torch.zeros(shape[:2]))
    for training in (True, False):
        y, mean, var, mask = forward(provider, of, training, "relu6", True)
        assert y.shape == mask.shape == shape
        assert torch.equal(mean, of["mean"]) or training
        dx, _, dweight, dbias, s = backward(provider, of, mask, mean, var, training, "relu6", False)
        assert dx.shape == shape
        for sums, size in ((s, shape[:2]), (dweight, shape[1]), (dbias, shape[1])):
            assert torch.equal(sums.cpu(), torch.zeros(size))


@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_nan_and_infinity_are_not_hidden(device, provider):
    serves(device, provider, torch.float32)
    x = normal((2, 3, 8, 8), 1).to(device)
    x[1, 2, 3, 4] = torch.nan
    y, mean, *_ = provider.batch_norm_act(x, *[None] * 5, True, EPS, "relu", 0.0)
    assert mean.isnan().tolist() == [False, False, True]
    assert bool(y[:, 2].isnan().all())
    assert int(provider.channel_scores(x, torch.ones_like(x)).isnan().sum()) == 1
    x[1, 2, 3, 4] = torch.inf
    assert float(provider.channel_scores(x, torch.ones_like(x))[1, 2]) == torch.inf


LARGE = (3, 11, 65_076_265)  # 2^31 + 33,097 elements, an odd number


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device,provider", [p for p in COMPILED if p.values[0] == "cuda"])
def test_more_elements_than_an_int_can_count(device, provider, layout):
    serves(device, provider, torch.bfloat16)
    needed = 45 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"less than {needed >> 30} GiB of the GPU's memory are free")
    large(device, provider, LARGE, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", [p.values[1] for p in COMPILED if p.values[0] == "cpu"])
def test_the_test_of_large_tensors(provider, layout):
    serves("cpu", provider, torch.bfloat16)
    large("cpu", provider, (3, 11, 999), layout)


def large(device, provider, shape, layout):
    """Row by row, for float64 takes four times the memory."""
    torch.use_deterministic_algorithms(False)  # which would fill every tensor first
    generator = torch.Generator(device).manual_seed(0)

    def some():
        last = layout == "channels_last"
        t = torch.empty((shape[0], shape[2], shape[1]) if last else shape, dtype=torch.bfloat16, device=device)
        t.normal_(generator=generator)
        return t.transpose(1, 2) if last else t

    rows = list(itertools.product(range(shape[0]), range(shape[1])))
    x, dy = some(), some()
    s = provider.channel_scores(x, dy)
    for n, c in rows:
        a, g = x[n, c].double(), dy[n, c].double()
        assert abs(float(s[n, c].double() - (a * g).sum())) <= 1e-6 * float((a * g).abs().sum())
    y, mean, var, _ = provider.batch_norm_act(x, *[None] * 5, True, EPS, "relu", 0.0)
    dx, _, dweight, dbias, s = provider.batch_norm_act_backward(
        dy, x, None, None, None, mean, var, True, EPS, "relu", 0.0, False
    )
    count = shape[0] * shape[2]
    for c in range(shape[1]):
        first = sum(float(x[n, c].double().sum()) for n in range(shape[0])) / count
        second = sum(float((x[n, c].double() - first).square().sum()) for n in range(shape[0])) / count
        assert abs(float(mean[c]) - first) < 1e-6 and abs(float(var[c]) / second - 1) < 1e-6
    for n, c in rows:
        xhat = (x[n, c].double() - mean[c].double()) / (var[c].double() + EPS).sqrt()
        assert distance(y[n, c], xhat.relu()) < ELEMENTS[torch.bfloat16]
        dz = dy[n, c].double() * (y[n, c] > 0)
        assert abs(float(s[n, c]) - float((xhat * dz).sum())) <= 1e-5 * float((xhat * dz).abs().sum())
        want = (dz - float(dbias[c]) / count - xhat * float(dweight[c]) / count) / (var[c].double() + EPS).sqrt()
        assert distance(dx[n, c], want) < ELEMENTS[torch.bfloat16]


@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_operations_wait_for_nothing(device, provider):
    serves(device, provider, torch.bfloat16)
    of = inputs((4, 16, 9, 9), torch.bfloat16, "channels_last", device)
    everything(provider, of)
    with without_waiting(device):
        everything(provider, of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_a_graph_of_operations_takes_new_inputs(device, provider, dtype):
    serves(device, provider, dtype)
    torch.use_deterministic_algorithms(False)  # fills memory, in a graph too, and would hide what is left from before
    shape, found = (4, 16, 9, 7), []
    of = inputs(shape, dtype, "channels_last", device)

    def work():
        found[:] = everything(provider, of)

    replay = captured(device, work)
    for seed in (11, 12):
        for i, name in enumerate(("x", "dy", "residual")):
            of[name].copy_(normal(shape, seed + 10 * i, dtype, "channels_last"))
        replay()
        got = [t.clone() for t in found]
        assert equal(got, everything(provider, of))


@needs_gpu
@pytest.mark.parametrize("provider", [p.values[1] for p in PROVIDERS if p.values[0] == "cuda"], ids=backends.name)
def test_streams_do_not_disturb_one_another(provider):
    """Twice as many calls in flight as streams; each reads what its own stream has made just before."""
    serves("cuda", provider, torch.float32)
    torch.use_deterministic_algorithms(False)
    cases = [inputs((16, 48, 28, 28), torch.float32, layout, "cuda") for layout in LAYOUTS]
    expected = [everything(provider, of) for of in cases]
    streams, found = [torch.cuda.Stream() for _ in cases], [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for of, stream, into in zip(cases, streams, found, strict=True):
            with torch.cuda.stream(stream):
                here = of | {"x": of["x"] * 2 * 0.5}
                into.append(everything(provider, here))
    torch.cuda.synchronize()
    for want, runs in zip(expected, found, strict=True):
        for got in runs:
            assert equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
@pytest.mark.parametrize("provider", [p.values[1] for p in PROVIDERS if p.values[0] == "cuda"], ids=backends.name)
def test_tensors_need_not_be_on_the_current_device(provider):
    serves("cuda:1", provider, torch.float32)
    of = inputs((3, 16, 9, 7), torch.float32, "channels_last", "cuda:1")
    with torch.cuda.device(0):
        got = everything(provider, of)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert equal(got, everything(provider, of))
    assert {t.device.index for t in got} == {1}


@pytest.mark.parametrize("device,provider", PROVIDERS)
def test_opcheck(device, provider):
    serves(device, provider, torch.float32)
    with forced(device, provider):
        for layout in LAYOUTS:
            of = inputs((3, 5, 4, 3), torch.float32, layout, device)
            x, dy, r = of["x"], of["dy"], of["residual"]
            opcheck(torch.ops.taylorkern.channel_scores.default, (x, dy))
            for training, activation, residual in [(True, "relu", True), (False, "relu6", True), (True, "silu", False)]:
                affine = of["weight"], of["bias"], of["mean"], of["var"]
                arguments = (x, r if residual else None, *affine, training, EPS, activation, SLOPE)
                opcheck(torch.ops.taylorkern.batch_norm_act.default, arguments)
                given = told(ops.batch_norm_act(*arguments), activation, residual)
                arguments = (dy, x, given, *affine, training, EPS, activation, SLOPE, residual)
                opcheck(torch.ops.taylorkern.batch_norm_act_backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation,residual", [("relu", True), ("leaky_relu", False), ("hardswish", False)])
def test_gradcheck(activation, residual, training, device):
    """In float64, which only the reference knows."""
    of = inputs((3, 4, 3, 2), torch.float64, "contiguous", device)
    names = ["x", "weight", "bias", *(["residual"] if residual else [])]
    z = torch.ones(3, 4, dtype=torch.float64, device=device)

    def run(x, weight, bias, r=None):
        settings = (of["mean"], of["var"], training, EPS, activation, SLOPE)
        return FusedBatchNormAct.apply(x, r, weight, bias, z, lambda *_: None, *settings)

    with forced(device, reference):
        assert torch.autograd.gradcheck(run, [of[name].requires_grad_() for name in names])
        assert torch.autograd.gradcheck(
            lambda a: ChannelGate.apply(a, z, None, lambda t: t, lambda: a, None), [of["x"]]
        )


def test_the_table_serves_a_gpu_of_every_kind():
    assert set(MARKS) == set(backends.PROVIDERS)
    assert backends.PROVIDERS["cuda"][-1] is reference
