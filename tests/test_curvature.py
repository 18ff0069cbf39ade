"""Curvature: cotangents against autograd's Hessian at the logits, h against the brute-force Gauss-Newton diagonal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import taylorkern as tk
from taylorkern.curvature import CrossEntropy, cotangents
from tests.cases import distance, normal
from tests.networks import plain, residual, with_gates

N, K = 3, 4
INDICES = torch.tensor([1, 3, 0])
DENSE = torch.tensor([[0, 1], [2, -100], [3, 3]])
PROBABILITIES = normal((N, K), 5, torch.float64).softmax(1)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
# Name: the rule, a loss of (logits, targets) as torch averages it, targets, and the logits' shape behind N.
RULES = {
    "cross entropy": ("cross_entropy", F.cross_entropy, INDICES, (K,)),
    "probabilities": ("cross_entropy", F.cross_entropy, PROBABILITIES, (K,)),
    "class weights": (
        CrossEntropy(WEIGHT), lambda f, t: F.cross_entropy(f, t, WEIGHT), INDICES, (K,),
    ),
    "weighted probabilities": (
        CrossEntropy(WEIGHT), lambda f, t: F.cross_entropy(f, t, WEIGHT), PROBABILITIES, (K,),
    ),
    "smoothed and weighted": (
        CrossEntropy(WEIGHT, label_smoothing=0.2),
        lambda f, t: F.cross_entropy(f, t, WEIGHT, label_smoothing=0.2),
        INDICES,
        (K,),
    ),
    "dense, some ignored": (
        CrossEntropy(WEIGHT, label_smoothing=0.1),
        lambda f, t: F.cross_entropy(f, t, WEIGHT, label_smoothing=0.1),
        DENSE,
        (K, 2),
    ),
    "squares": ("mse", F.mse_loss, normal((N, K, 2), 6, torch.float64), (K, 2)),
    "binary": ("bce_with_logits", F.binary_cross_entropy_with_logits, (PROBABILITIES > 0.3).double(), (K,)),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_exact_cotangents_make_up_the_hessian_at_the_logits(name):
    rule, loss, targets, shape = RULES[name]
    f = normal((N, *shape), 1, torch.float64)
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, targets), f)
    size = f[0].numel()
    per_sample = hessian.reshape(N, size, N, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [N, size, size]
    columns = torch.stack([v.reshape(N, size) for v in cotangents(f, targets, rule, "exact", None)])
    assert distance(torch.einsum("vni,vnj->nij", columns, columns), N * per_sample) < 1e-12


@pytest.mark.parametrize("method", ["sketch", "mc"])
@pytest.mark.parametrize("name", RULES)
def test_random_cotangents_are_unbiased(name, method):
    """20,000 draws; each entry of E[v vᵀ] within 5 of its own standard errors, which are below 4 % of the largest."""
    rule, _, targets, shape = RULES[name]
    f = normal((N, *shape), 1, torch.float64)
    size, generator = f[0].numel(), torch.Generator().manual_seed(0)
    exact = torch.stack([v.reshape(N, size) for v in cotangents(f, targets, rule, "exact", None)])
    want = torch.einsum("vni,vnj->nij", exact, exact)
    draws = torch.stack(
        [v.reshape(N, size) for _ in range(20_000) for v in cotangents(f, targets, rule, method, generator)]
    )
    products = torch.einsum("vni,vnj->vnij", draws, draws)
    error = products.std(0) / len(draws) ** 0.5
    assert bool(((products.mean(0) - want).abs() <= 5 * error + 1e-12).all())
    assert float(error.max()) < 0.04 * float(want.abs().max())


def batch(seed, n=6):
    return normal((n, 2, 8, 8), seed, torch.float64), torch.arange(n) % 5


def made(build):
    torch.manual_seed(0)
    model = tk.convert(build().double()).eval()
    return model, tk.Scores(model, batch(0)[0])


def brute_force(model, units, x):
    """h [U] = mean_n J_nᵀ H_n J_n on the diagonal, J the Jacobian of the logits in explicit gates, by autograd."""
    wide = tk.revert(copy.deepcopy(model))
    z = torch.ones(len(x), len(units), dtype=torch.float64, requires_grad=True)
    hooks = with_gates(wide, units, z)
    f = wide(x)
    jacobian = torch.stack(  # [K, N, U]
        [torch.autograd.grad(f[:, k].sum(), z, retain_graph=True)[0] for k in range(f.shape[1])]
    )
    for hook in hooks:
        hook.remove()
    p = f.detach().softmax(1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("knu,nkl,lnu->u", jacobian, hessian, jacobian) / len(x)


@pytest.mark.parametrize("build", [residual, plain])
def test_exact_is_the_brute_force_diagonal_also_for_linked_units(build):
    model, scores = made(build)
    x, target = batch(1)
    logits = model(x)
    scores.curvature(logits, target, method="exact")
    F.cross_entropy(logits, target).backward()
    want = brute_force(model, scores.units, x)
    assert distance(2 * scores.importance("obd"), want) < 1e-9
    assert build is plain or any(len(unit.places) > 1 for unit in scores.units)


@pytest.mark.parametrize("method", ["sketch", "mc"])
def test_estimates_of_h_are_unbiased(method):
    """400 draws: every unit within 5 standard errors; a bias of 15 % in the sum over units would be 5 of them."""
    model, scores = made(residual)
    x, target = batch(1)
    logits, generator = model(x), torch.Generator().manual_seed(1)
    want, estimates = brute_force(model, scores.units, x), []
    for _ in range(400):
        scores.curvature(logits, target, method=method, generator=generator)
        estimates.append(scores._arrivals.h)
    drawn = torch.stack(estimates)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - want).abs() <= 5 * error).all())
    assert float(drawn.sum(1).std()) / len(drawn) ** 0.5 < 0.03 * float(want.sum())


def test_more_draws_average():
    model, scores = made(residual)
    x, target = batch(1)
    logits = model(x)
    scores.curvature(logits, target, draws=3, generator=torch.Generator().manual_seed(4))
    together, generator, single = scores._arrivals.h, torch.Generator().manual_seed(4), []
    for _ in range(3):
        scores.curvature(logits, target, generator=generator)
        single.append(scores._arrivals.h)
    assert distance(together, torch.stack(single).mean(0)) < 1e-12


def arrived(scores):
    """s[n, u] of the minibatch under way, [N, U] in float64, place by place."""
    s = {layer: gate.leaves()[0].grad.double() for layer, gate in scores._attachment.gates.items()}
    return torch.stack([sum(s[layer][:, c] for layer, c in unit.places) for unit in scores.units], dim=1)


def test_second_order_criteria_are_their_formulas_over_the_minibatches_that_have_a_curvature():
    model, scores = made(residual)
    changes, fishers, halves = [], [], []
    for seed in range(4):
        x, target = batch(seed)
        logits = model(x)
        if seed % 2 == 0:
            scores.curvature(logits, target, method="exact")
            h = scores._arrivals.h
        F.cross_entropy(logits, target).backward()
        s = arrived(scores)
        if seed % 2 == 0:
            changes.append((h / 2 - s.sum(0)).square())
            halves.append(h / 2)
        fishers.append((len(x) * s.square().sum(0) / 2 - s.sum(0)).square())
    for name, want in (("taylor_so", changes), ("obd", halves), ("taylor_so_fisher", fishers)):
        assert distance(scores.importance(name), torch.stack(want).mean(0)) < 1e-12, name
    assert scores.minibatches == 4


class Backwards(TorchDispatchMode):
    """Records which gradients each convolution's backward was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append(tuple(args[-1]))
        assert func is not torch.ops.aten.mm.default or args[0].shape[0] == 6, "a weight gradient of a linear layer"
        return func(*args, **(kwargs or {}))


def test_no_weight_gradient_is_computed_and_nothing_before_the_first_gate():
    model, scores = made(residual)
    x, target = batch(1)
    logits = model(x.requires_grad_())
    with Backwards() as seen:
        scores.curvature(logits, target)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert seen.asked == [(True, False, False)] * (convolutions - 1)  # all but the stem, which is before its gate
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    F.cross_entropy(logits, target).backward()
    assert scores.minibatches == 1


def test_every_nth_call_counts_from_the_reset_on_and_through_saving():
    model, scores = made(residual)

    def curved(scores, model, calls):
        for seed in range(calls):
            logits = model(batch(seed)[0])
            scores.curvature(logits, every_n=3)
            F.cross_entropy(logits, batch(seed)[1]).backward()
        scores.fold()
        return int(scores._tally.statistics.curved)

    assert curved(scores, model, 5) == 2
    other_model, other = made(residual)
    other.load_state_dict(scores.state_dict())
    assert curved(other, other_model, 1) == 2 and curved(other, other_model, 1) == 3
    scores.reset()
    assert curved(scores, model, 1) == 1
    scores.reset()
    with pytest.raises(ValueError, match="no rule"):
        scores.curvature(model(batch(0)[0]), loss="hinge", every_n=3)
    assert curved(scores, model, 1) == 1  # a refused call is none
    with pytest.raises(ValueError, match="every_n=0"):
        scores.curvature(model(batch(0)[0]), every_n=0)


def test_the_signed_prediction_is_of_the_minibatches_that_have_a_curvature():
    model, scores = made(residual)
    changes = []
    for seed in range(3):
        x, target = batch(seed)
        logits = model(x)
        if seed != 1:
            scores.curvature(logits, target, method="exact")
            h = scores._arrivals.h
        F.cross_entropy(logits, target).backward()
        s = arrived(scores)
        if seed != 1:
            changes.append(h / 2 - s.sum(0))
    assert distance(scores.predicted_change("taylor_so"), torch.stack(changes).mean(0)) < 1e-12


def test_curvature_survives_saving_and_leaves_dropped_minibatches_out():
    model, scores = made(residual)
    x, target = batch(1)
    for factor in (1.0, torch.nan):
        logits = model(x)
        scores.curvature(logits, target)
        (factor * F.cross_entropy(logits, target)).backward()
    assert scores.dropped == 1
    fresh = made(residual)[1]
    fresh.load_state_dict(scores.state_dict())
    assert torch.equal(fresh.importance("taylor_so"), scores.importance("taylor_so"))
    assert torch.equal(scores.importance("obd"), scores._tally.statistics.sums["curvature"] / 2)


def test_a_curvature_without_a_backward_never_joins_another_minibatch():
    model, scores = made(residual)
    x, target = batch(1)
    scores.curvature(model(x), target)  # this minibatch is skipped
    F.cross_entropy(model(batch(2)[0]), target).backward()
    with pytest.raises(RuntimeError, match="no curvature yet"):
        scores.importance("taylor_so")
    assert scores.minibatches == 1


def test_an_evaluation_in_between_leaves_the_curvature_alone():
    model, scores = made(residual)
    x, target = batch(1)
    logits = model(x)
    scores.curvature(logits, target)
    with torch.no_grad():
        model(batch(2)[0])
    F.cross_entropy(logits, target).backward()
    assert scores.importance("taylor_so").isfinite().all()


def test_a_users_own_cotangents():
    model, scores = made(residual)
    x, target = batch(1)
    logits = model(x)
    scores.curvature(logits, target, method="exact")
    want = scores._arrivals.h
    scores.curvature(logits, target, loss=lambda f, t: CrossEntropy().exact(f, t))
    assert distance(scores._arrivals.h, want) < 1e-12


def test_bad_requests_say_what_to_do():
    model, scores = made(residual)
    x, target = batch(1)
    logits = model(x)
    with pytest.raises(ValueError, match=r"no rule for loss 'hinge'.*callable"):
        scores.curvature(logits, target, loss="hinge")
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match=r"seems to be the loss itself. Pass one of 'cross_entropy'"):
            scores.curvature(logits, target, loss=loss)
    with pytest.raises(ValueError, match=r"cotangent \[5\] for logits \[6, 5\]"):
        scores.curvature(logits, target, loss=lambda f, t: [f[0]])
    with pytest.raises(ValueError, match="not a tuple"):
        scores.curvature((logits, None), target)
    with pytest.raises(ValueError, match="method 'full'"):
        scores.curvature(logits, target, method="full")
    with pytest.raises(ValueError, match="draws=0"):
        scores.curvature(logits, target, draws=0)
    with pytest.raises(ValueError, match="needs the targets"):
        scores.curvature(logits, loss=CrossEntropy(WEIGHT))
    with pytest.raises(ValueError, match="depend on no gate"):
        scores.curvature(logits.detach(), target)
    with pytest.raises(ValueError, match="depend on no gate"):
        scores.curvature(torch.ones(6, 5, requires_grad=True) * 2, target)
    F.cross_entropy(logits, target).backward()
    with pytest.raises(RuntimeError, match=r"before loss.backward\(\)"):
        scores.curvature(logits, target)
    with pytest.raises(RuntimeError, match=r"no curvature yet: call scores.curvature"):
        scores.importance("taylor_so")
