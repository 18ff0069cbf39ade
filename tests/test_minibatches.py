"""What a minibatch is: several backwards to a step, sums in place of means, a scaled loss, steps that are skipped."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import taylorkern as tk
from tests.cases import distance
from tests.loops import Loop, importances, network, samples

X = samples()[0][0][:1]
CRITERIA = ("taylor_fo", "taylor_fg", "taylor_so_fisher", "taylor_output", "taylor_weight")


def made(model=None, rate=0.0, **options):
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    return model, optimizer, tk.Scores(model, X, criteria=CRITERIA, optimizer=optimizer, **options)


def cross_entropy(model, x, target, **options):
    return nn.functional.cross_entropy(model(x), target, **options)


def assert_alike(scores, wanted, bound=1e-5):
    for name, importance in wanted.items():
        assert distance(scores.importance(name), importance) < bound, name


@pytest.fixture(scope="module")
def plain():
    return importances(Loop().run(network()))


@pytest.mark.parametrize("sizes", [[4] * 4, [1, 15], [7, 1, 8]])
def test_a_sum_over_samples_scores_as_their_mean(plain, sizes):
    model, optimizer, scores = made(reduction="sum")
    for x, target in samples():
        for part, wanted in zip(x.split(sizes), target.split(sizes), strict=True):
            cross_entropy(model, part, wanted, reduction="sum").backward()
        optimizer.step()
    assert scores.minibatches == 2
    assert_alike(scores, plain)


def test_uneven_parts_weigh_by_their_samples(plain):
    model, optimizer, scores = made()
    for x, target in samples():
        for part, wanted in zip(x.split([5, 11]), target.split([5, 11]), strict=True):
            (cross_entropy(model, part, wanted) * len(part) / 16).backward()
        optimizer.step()
    assert_alike(scores, plain)


def test_curvature_in_parts_is_that_of_the_whole():
    found = []
    for sizes in ([16], [4, 12]):
        model, optimizer, scores = made(gram="full")
        for x, target in samples():
            for part, wanted in zip(x.split(sizes), target.split(sizes), strict=True):
                logits = model(part)
                scores.curvature(logits, wanted, method="exact")
                (nn.functional.cross_entropy(logits, wanted) * len(part) / 16).backward()
            optimizer.step()
        found.append(scores)
    whole, parts = found
    assert_alike(parts, {name: whole.importance(name) for name in ("taylor_so", "obd")})
    assert distance(parts.gram()[0].matrix, whole.gram()[0].matrix) < 1e-5


def test_the_gram_matrix_of_parts_is_that_of_the_whole():
    whole, parts = (made(gram="full") for _ in range(2))
    x, target = samples()[0]
    cross_entropy(whole[0], x, target).backward()
    for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
        (cross_entropy(parts[0], part, wanted) / 4).backward()
    assert distance(parts[2].gram()[0].matrix, whole[2].gram()[0].matrix) < 1e-5


def test_several_losses_each_with_a_forward_of_its_own_meet_in_one_minibatch():
    model, optimizer, scores = made()
    x, target = samples()[0]
    cross_entropy(model, x, target).backward()
    model(x).square().mean().backward()
    optimizer.step()
    other, _, both = made()
    logits = other(x)
    (nn.functional.cross_entropy(logits, target) + logits.square().mean()).backward()
    assert scores.minibatches == both.minibatches == 1
    assert distance(scores.importance("taylor_fo"), both.importance("taylor_fo")) < 1e-5


def test_without_an_optimizer_each_forward_is_a_minibatch():
    model = network()
    scores = tk.Scores(model, X)
    for x, target in samples():
        for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            cross_entropy(model, part, wanted).backward()
    assert scores.minibatches == 8


def test_only_step_ends_a_minibatch_where_no_optimizer_does(plain):
    model = network()
    scores = tk.Scores(model, X, criteria=CRITERIA, optimizer=())
    for x, target in samples():
        for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
            (cross_entropy(model, part, wanted) / 2).backward()
        assert scores.step()
    assert scores.minibatches == 2
    assert_alike(scores, plain)


def test_several_optimizers_that_step_one_after_the_other_end_one_minibatch(plain):
    model = network()
    first, *others = model.parameters()
    optimizers = [torch.optim.SGD([first], 0.0), torch.optim.SGD(others, 0.0)]
    scores = tk.Scores(model, X, criteria=CRITERIA, optimizer=optimizers)
    for x, target in samples():
        for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
            (cross_entropy(model, part, wanted) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert scores.minibatches == 2
    assert_alike(scores, plain)


def test_evaluation_on_the_way_is_no_part_of_a_minibatch(plain):
    model, optimizer, scores = made()
    for x, target in samples():
        for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
            (cross_entropy(model, part, wanted) / 2).backward()
            with torch.no_grad():
                model(x)
        optimizer.step()
    assert scores.minibatches == 2
    assert_alike(scores, plain)


def test_every_evaluation_of_a_closure_is_a_minibatch():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), 1e-3, max_iter=3)
    scores = tk.Scores(model, X, optimizer=optimizer)
    x, target = samples()[0]
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model, x, target)
        loss.backward()
        calls.append(loss.item())
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert len(calls) > 2 and scores.minibatches == len(calls)


def test_clipping_zeroing_and_frozen_weights_change_no_score(plain):
    model, optimizer, scores = made()
    for parameter in (model.stem.weight, *model.norm.parameters(), *model.hidden.parameters()):
        parameter.requires_grad_(False)
    names = [name for name in CRITERIA if name != "taylor_weight"]
    for x, target in samples():
        cross_entropy(model, x, target).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert_alike(scores, {name: plain[name] for name in names}, 1e-6)


def test_a_detached_part_is_named():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            trunk = self.trunk(x).relu()
            return self.out(self.head(trunk.detach() if self.training else trunk).relu())

    model = tk.convert(Detached())
    scores = tk.Scores(model, torch.rand(1, 4))
    model(torch.rand(8, 4)).square().mean().backward()
    with pytest.warns(UserWarning, match="no gradient has reached the gates of trunk"):
        importance = scores.importance("taylor_fo")
    assert [float(importance[i]) > 0 for i, unit in enumerate(scores.units) if unit.places[0][0] == "trunk"] == [
        False
    ] * 6


def scaled_step(model, optimizer, scaler, x, target, poison=False):
    with torch.autocast("cpu", torch.float16):
        logits = model(x)
    loss = nn.functional.cross_entropy(logits.float(), target)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if poison:  # of a parameter alone, so that no score is
        model.out.bias.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("told", ["by the next forward", "by step"])
def test_skipped_steps_are_dropped_and_counted(told, hooked, fused):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    scores = tk.Scores(model, X, optimizer=optimizer if hooked else None, scaler=scaler)
    other = network()
    kept = tk.Scores(other, X)
    counted = []
    for i, poison in enumerate([False, True, True, False, False, False, True]):
        x, target = samples(steps=7)[i]
        scaled_step(model, optimizer, scaler, x, target, poison)
        if told == "by step":
            counted.append(scores.step())
        if not poison:
            with torch.autocast("cpu", torch.float16):
                logits = other(x)
            (256 * nn.functional.cross_entropy(logits.float(), target)).backward()
    assert counted in ([], [True, False, False, True, True, True, False])
    assert (scores.minibatches, scores.dropped) == (4, 3)
    assert distance(scores.importance("taylor_fo") * 256**2, kept.importance("taylor_fo")) < 1e-2


def test_a_scale_that_is_loaded_before_the_first_step_is_no_skipped_one():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scores = tk.Scores(model, X, optimizer=optimizer, scaler=scaler)
    scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=8.0).state_dict())
    scaled_step(model, optimizer, scaler, *samples()[0])
    assert (scores.minibatches, scores.dropped) == (1, 0)


def test_step_before_the_scaler_s_update_knows_of_a_skipped_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scores = tk.Scores(model, X, optimizer=optimizer, scaler=scaler)
    x, target = samples()[0]
    scaler.scale(cross_entropy(model, x, target)).backward()
    model.out.bias.grad.fill_(torch.nan)
    scaler.step(optimizer)
    assert not scores.step()
    scaler.update()
    assert (scores.minibatches, scores.dropped) == (0, 1)


def test_a_pruner_s_round_does_not_count_skipped_steps():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    pruner = tk.Pruner(model, X, optimizer=optimizer, scaler=scaler, target=0.3, every=2, step=3)
    removed = []
    for i, poison in enumerate([True, False, True, True, False]):
        scaled_step(model, optimizer, scaler, *samples(steps=5)[i], poison)
        removed.append(len(pruner.step()))
    assert removed == [0, 0, 0, 0, 3]


def test_a_pruner_s_minibatch_is_what_its_optimizer_sees():
    removed = []
    for parts in (1, 4):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        pruner = tk.Pruner(model, X, optimizer=optimizer, criterion="taylor_so_fisher", target=0.4, every=2, step=3)
        went = []
        for x, target in samples(steps=6):
            optimizer.zero_grad()
            for part, wanted in zip(x.chunk(parts), target.chunk(parts), strict=True):
                (cross_entropy(model, part, wanted) / parts).backward()
            optimizer.step()
            went.append([unit.places for unit in pruner.step()])
        removed.append(went)
    assert removed[0] == removed[1] and sum(map(len, removed[0])) > 3


def test_hooks_hold_no_scores_alive_and_go_with_them():
    _, optimizer, scores = made()
    seen = weakref.ref(scores)
    del scores
    gc.collect()
    assert seen() is None and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    _, optimizer, scores = made()
    scores.detach()
    assert not optimizer._optimizer_step_pre_hooks


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction='none' is not one of 'mean', 'sum'"):
        tk.Scores(network(), X, reduction="none")


def per_sample_gradients(model, x, target):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters, x, target):
        logits = torch.func.functional_call(model, (parameters, buffers), (x[None],))
        return nn.functional.cross_entropy(logits, target[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)


def test_functional_transforms_compute_what_they_would_and_say_that_nothing_is_scored():
    model = tk.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)))
    x, target = samples()[0]
    expected = per_sample_gradients(model, x, target)
    scores = tk.Scores(model, X)
    with pytest.warns(UserWarning, match=r"inside a torch.func transform"):
        found = per_sample_gradients(model, x, target)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert scores.minibatches == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(model, x, target).backward()
    assert scores.minibatches == 1


@pytest.mark.parametrize("criteria", [[], ["taylor_output"]])
def test_checkpointed_normalisations_are_unpacked_once(criteria):
    found = []
    for checkpointed in (False, True):
        model = network()
        scores = tk.Scores(model, X, criteria=criteria)
        x, target = samples()[0]
        nn.functional.cross_entropy(model(x, checkpointed), target).backward()
        found.append(scores.importance((criteria or ["taylor_fo"])[0]))
    assert torch.equal(*found)


def test_a_minibatch_can_be_thrown_away(plain):
    model, optimizer, scores = made()
    for x, target in samples():
        (1e3 * cross_entropy(model, -x, target)).backward()
        scores.discard()
        cross_entropy(model, x, target).backward()
        optimizer.step()
    assert (scores.minibatches, scores.dropped) == (2, 0)
    assert_alike(scores, {name: plain[name] for name in CRITERIA if name != "taylor_weight"}, 1e-6)


def test_a_step_that_is_broken_off_spoils_none_but_its_own(plain):
    model, optimizer, scores = made()

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    optimizer.step()
    for x, target in samples():
        for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            (cross_entropy(model, part, wanted) / 4).backward()
        optimizer.step()
    assert scores.minibatches == 2
    assert_alike(scores, plain)


def test_the_last_backward_of_an_accumulated_step_may_be_its_closure_s(plain):
    model, optimizer, scores = made()
    for x, target in samples():
        *first, last = zip(x.chunk(4), target.chunk(4), strict=True)
        for part, wanted in first:
            (cross_entropy(model, part, wanted) / 4).backward()
        optimizer.step(lambda last=last: (cross_entropy(model, *last) / 4).backward())
    assert scores.minibatches == 2
    assert_alike(scores, plain)


def test_reentrant_checkpoints_are_unscaled():
    found = []
    for factor in (1.0, 1024.0):
        torch.manual_seed(0)
        model = tk.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)))
        scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=10**6)
        scores = tk.Scores(model, X, scaler=scaler)
        for x, target in samples():
            logits = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
            scaler.scale(logits[range(16), target].mean()).backward()
        found.append(scores.importance("taylor_fo"))
    assert distance(*found) < 1e-6


def test_sums_over_samples_that_layers_see_in_other_numbers_warn():
    model = tk.convert(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(0, (-1, 5)), nn.Flatten(), nn.Linear(30, 3))
    )
    scores = tk.Scores(model, None, reduction="sum")
    model(torch.rand(10, 4)).square().sum().backward()
    with pytest.warns(UserWarning, match=r"0 was given \[10\] samples and 4 \[2\]"):
        scores.importance("taylor_fo")


def test_forward_mode_gradients_pass_and_are_not_scored():
    model = tk.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)))
    scores = tk.Scores(model, X)
    x = samples()[0][0]
    with forward_ad.dual_level(), pytest.warns(UserWarning, match="not scored"):
        _, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x)))
    assert tangent is not None and scores.minibatches == 0


class Prepared(torch.optim.Optimizer):
    """As accelerate's: an optimiser that has another one do everything."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_prepared_optimizers_are_heard_of():
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.0)
    scores = tk.Scores(model, X, optimizer=Prepared(inner))
    x, target = samples()[0]
    for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
        cross_entropy(model, part, wanted).backward()
    inner.step()
    assert scores.minibatches == 1
