"""Gradients written over the one that comes in: only where nobody else has it, and then with the same bits."""

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern import direct
from taylorkern.layers import fused_batch_norm
from tests.callers import equal, needs_library
from tests.cases import LAYOUTS, in_layout, normal
from tests.fused import CALLERS, called_from

pytestmark = needs_library

WHOLE = (3, 32, 8, 8)  # rows of whole cache lines in every layout and dtype
KINDS = {
    "gated": (None, False),
    "none": ("none", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "sum": ("none", True),
    "sum and relu": ("relu", True),
    "sum and relu6": ("relu6", True),
    "sum and leaky relu": ("leaky_relu", True),
}

over_kinds = pytest.mark.parametrize("kind", KINDS)


def run(layer, x, residual, kind):
    activation, added = KINDS[kind]
    if activation is None:
        return layer(x)
    return fused_batch_norm(layer, layer.gate, x, residual if added else None, activation, 0.1)


class Case:
    """A scored layer, its input and a residual, all of which require gradients; x and the residual are no leaves."""

    def __init__(self, shape=WHOLE, layout="contiguous", dtype=torch.float32, training=True):
        layer = nn.BatchNorm2d(shape[1]).to(torch.promote_types(dtype, torch.float32)).train(training)
        with torch.no_grad():
            for seed, t in enumerate([*layer.parameters(), *layer.buffers()]):
                if t.dim():
                    t.copy_(0.3 * normal(tuple(t.shape), seed) + 1).abs_()
        self.layer = tk.convert(layer)
        self.scores = tk.Scores(self.layer, None)
        self.leaves = [in_layout(normal(shape, seed, dtype), layout).requires_grad_() for seed in (11, 12)]
        self.x, self.residual = (leaf * 1 for leaf in self.leaves)

    def run(self, kind):
        return run(self.layer, self.x, self.residual, kind)

    def found(self):
        gradients = [t.grad for t in (*self.leaves, *self.layer.parameters())]
        return [*gradients, *self.layer.gate.drain(), *self.layer.buffers()]


def same(use, *arguments, **options):
    """``use(case)`` from C++, which may write over gradients, and from Python, which never does."""
    found = []
    for caller in CALLERS:
        with called_from(caller):
            case = Case(*arguments, **options)
            extra = use(case)
            found.append([*case.found(), *(extra or [])])
    equal(*found)


class Lends(torch.autograd.Function):
    """A user's function, whose gradient is what ``give`` gives."""

    @staticmethod
    def forward(ctx, y, give):
        ctx.give = give
        return y.sum()

    @staticmethod
    def backward(ctx, dy):
        return ctx.give(), None


@over_kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_nobody_else_has_is_written_over(layout, kind):
    """Which saves memory and time, and without which the other tests here would show nothing."""
    library = direct.library()
    case = Case(layout=layout)
    y = case.run(kind)
    before = library.written_over()
    y.sin().sum().backward()
    # By itself, a sum hands its gradient on to the residual.
    assert library.written_over() - before == (kind != "sum")


@pytest.mark.parametrize("kind", ["gated", "relu", "sum and relu", "sum and relu6"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 64, 112, 112), (1, 32, 256, 192), (40, 512, 16, 8)])
def test_bits_are_the_same_where_outputs_go_past_the_caches(shape, layout, training, kind):
    same(lambda case: case.run(kind).sin().sum().backward(), shape, layout, torch.float32, training)


@over_kinds
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [WHOLE, (2, 64, 4, 4), (40, 32, 1, 1), (2, 16, 28, 28), (3, 5, 7, 9), (2, 33, 4, 4)])
def test_bits_are_the_same_as_without(shape, layout, dtype, training, kind):
    same(lambda case: case.run(kind).sin().sum().backward(), shape, layout, dtype, training)


@over_kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_a_user_gives_stays_as_it_is(layout, kind):
    def use(case):
        dy = in_layout(normal(WHOLE, 3), layout)
        kept = dy.clone()
        y = case.run(kind)
        y.backward(dy)
        assert torch.equal(dy, kept)

    same(use, layout=layout)


@over_kinds
def test_gradients_that_somebody_keeps_stay_as_they_are(kind):
    def use(case):
        kept = []
        y = case.run(kind)
        y.retain_grad()
        y.register_hook(lambda g: kept.append((g, g.clone())))
        y.grad_fn.register_prehook(lambda given: kept.append((given[0], given[0].clone())))
        y.grad_fn.register_hook(lambda outgoing, given: kept.append((given[0], given[0].clone())))
        case.x.register_hook(lambda g: kept.append((g, g.clone())))
        y.sin().sum().backward()
        assert len(kept) == 4 and all(torch.equal(*pair) for pair in kept)
        return [y.grad, *(g for g, _ in kept)]

    same(use)


@pytest.mark.parametrize("hook", ["tensor", "prehook", "posthook"])
@over_kinds
def test_a_single_keeper_is_enough(kind, hook):
    def use(case):
        kept = []
        y = case.run(kind)
        keep = {
            "tensor": lambda: y.register_hook(lambda g: kept.append((g, g.clone()))),
            "prehook": lambda: y.grad_fn.register_prehook(lambda given: kept.append((given[0], given[0].clone()))),
            "posthook": lambda: y.grad_fn.register_hook(lambda _, given: kept.append((given[0], given[0].clone()))),
        }
        keep[hook]()
        y.sin().sum().backward()
        (pair,) = kept
        assert torch.equal(*pair)
        return [pair[0]]

    same(use)


@over_kinds
def test_captured_gradients_of_the_output_stay_as_they_are(kind):
    def use(case):
        y = case.run(kind)
        dy, dx = torch.autograd.grad(y.sin().sum(), [y, case.x])
        assert torch.equal(dy, y.detach().cos())
        return [dy, dx]

    same(use)


@over_kinds
def test_two_that_share_one_gradient(kind):
    """An addition sends the same tensor both ways: the first to come must leave it to the other."""

    def use(case):
        a = case.run(kind)
        b = run(case.layer, case.leaves[1] * 3, case.leaves[0] * 2, kind)
        (a + b).sin().sum().backward()

    same(use)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.flatten(),
        lambda y: y.view(-1),
        lambda y: y.transpose(0, 1),
        lambda y: y.unsqueeze(0),
        lambda y: y.reshape(3, 2, -1),
        lambda y: y.split(16, 1)[0],
    ],
    ids=["flatten", "view", "transpose", "unsqueeze", "reshape", "split"],
)
@over_kinds
def test_a_view_of_what_a_user_keeps_is_not_written_over(kind, between):
    """What comes in is a tensor that nobody else has, of memory that somebody has."""

    def use(case):
        y = between(case.run(kind))
        dy = normal(tuple(y.shape), 5)
        kept = dy.clone()
        y.backward(dy)
        assert torch.equal(dy, kept)

    same(use)


@over_kinds
def test_a_graph_that_is_kept_gives_the_same_twice(kind):
    def use(case):
        loss = case.run(kind).sin().sum()
        loss.backward(retain_graph=True)
        once = [t.grad.clone() for t in case.leaves if t.grad is not None]
        loss.backward()
        for t, g in zip([t for t in case.leaves if t.grad is not None], once, strict=True):
            assert torch.equal(t.grad, 2 * g)

    same(use)


@over_kinds
def test_memory_that_is_not_torchs_stays_as_it_is(kind):
    """An autograd function of a user may return memory that it goes on using.

    Here torch's own count of who has the tensor is enough; where a function in C++ lends memory, it would not be.
    """
    elsewhere = normal(WHOLE, 4).numpy()
    kept = elsewhere.copy()

    def use(case):
        Lends.apply(case.run(kind), lambda: torch.from_numpy(elsewhere)).backward()
        assert (elsewhere == kept).all()

    same(use)


@pytest.mark.parametrize("make", [lambda t: t[:3], lambda t: t.view_as(t), lambda t: t.detach(), torch._lazy_clone])
@over_kinds
def test_views_and_lazy_copies_of_what_a_user_keeps(kind, make):
    base = normal((4, *WHOLE[1:]), 5)[: 4 if make(torch.zeros(4)).shape == (3,) else 3].contiguous()
    kept = base.clone()

    def use(case):
        Lends.apply(case.run(kind), lambda: make(base)).backward()
        assert torch.equal(base, kept)

    same(use)
