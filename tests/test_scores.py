"""Scores: statistics per unit against explicit gates in float64, minibatch by minibatch."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import taylorkern as tk
from taylorkern.criteria import CRITERIA
from taylorkern.folding import Folding
from tests.cases import distance
from tests.networks import gate_gradients, plain, residual


def batch(seed, n=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(5, (n,), generator=generator)


def made(build, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = tk.convert(build().to(dtype))
    return model, tk.Scores(model, batch(0)[0].to(dtype), **options)


def train_on(model, seeds, n=8):
    for seed in seeds:
        x, target = batch(seed, n, next(model.parameters()).dtype)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()


def expected(model, scores, seeds, n=8):
    """The gate gradients of every minibatch, [B, N, U], on a float64 copy of the unconverted model."""
    wide = tk.revert(copy.deepcopy(model)).double()
    return torch.stack([gate_gradients(wide, scores.units, *batch(seed, n, torch.float64)) for seed in seeds])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [residual, plain])
def test_gate_criteria_are_their_formulas(build, training):
    model, scores = made(build, torch.float64)
    model.train(training)
    seeds = [1, 2, 3]
    s = expected(model, scores, seeds)
    train_on(model, seeds)
    gate = s.sum(1)
    assert distance(scores.importance("taylor_fo"), gate.square().mean(0)) < 1e-9
    assert distance(scores.importance("taylor_fo_abs"), gate.abs().mean(0)) < 1e-9
    assert distance(scores.importance("taylor_fg"), (8 * s).square().mean(1).mean(0)) < 1e-9
    assert scores.minibatches == 3 and scores.dropped == 0


def test_float32_scores_are_float32_close():
    model, scores = made(residual)
    s = expected(model, scores, [1])
    train_on(model, [1])
    assert distance(scores.importance("taylor_fo"), s[0].sum(0).square()) < 1e-4


def test_linked_channels_add_before_the_square():
    _, scores = made(residual)
    linked = [unit for unit in scores.units if len(unit.places) > 1]
    assert {tuple(layer for layer, _ in unit.places) for unit in linked} == {("1", "3.bn2"), ("4.bn2", "4.down.1")}
    assert all(len({channel for _, channel in unit.places}) == 1 for unit in linked)


def test_bn_taylor_is_taylor_fo_where_every_gate_is_behind_a_bn():
    model, scores = made(residual)
    train_on(model, [1])
    assert distance(scores.importance("bn_taylor"), scores.importance("taylor_fo")) < 1e-12
    by_hand = torch.zeros(len(scores.units))
    for u, unit in enumerate(scores.units):
        for layer, c in unit.places:
            bn = model.get_submodule(layer)
            by_hand[u] += (bn.weight[c] * bn.weight.grad[c] + bn.bias[c] * bn.bias.grad[c]).detach()
    assert distance(scores.importance("bn_taylor"), by_hand.square()) < 1e-4


class Mixed(nn.Module):
    """A unit with a place behind batch normalisation and one without, units with one kind only, and a branch."""

    def __init__(self):
        super().__init__()
        self.normed, self.bn, self.bare = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(2, 4, 1)
        self.alone, self.hidden, self.out = nn.Conv2d(4, 3, 1), nn.Linear(3, 6), nn.Linear(6, 5)
        self.extra, self.extra_out = nn.Linear(3, 2), nn.Linear(2, 5)
        self.branch = True

    def forward(self, x):
        x = (self.bn(self.normed(x)) + self.bare(x)).relu()
        x = self.alone(x).relu().mean((2, 3))
        out = self.out(self.hidden(x).relu())
        return out + self.extra_out(self.extra(x).relu()) if self.branch else out


def test_bn_taylor_adds_batch_normalisations_channels_alone():
    model, scores = made(Mixed, torch.float64)
    train_on(model, [1])
    want = torch.full((len(scores.units),), torch.inf, dtype=torch.float64)
    product = (model.bn.weight * model.bn.weight.grad + model.bn.bias * model.bn.bias.grad).detach()
    for u, unit in enumerate(scores.units):
        channels = dict(unit.places)
        if "bn" in channels:
            assert "bare" in channels
            want[u] = product[channels["bn"]].square()
    got, judged = scores.importance("bn_taylor"), want.isfinite()
    assert judged.sum() == 4 and got[~judged].isposinf().all()
    assert distance(got[judged], want[judged]) < 1e-9


def test_layers_that_score_in_some_minibatches_only():
    model, scores = made(Mixed, torch.float64)
    together = []
    for seed, branch in ((1, True), (2, False), (3, True)):
        model.branch = branch
        together.append(expected(model, scores, [seed])[0])
        train_on(model, [seed])
    want = torch.stack([s.sum(0).square() for s in together]).mean(0)
    assert distance(scores.importance("taylor_fo"), want) < 1e-9
    fisher = torch.stack([8 * s.square().sum(0) for s in together]).mean(0)
    assert distance(scores.importance("taylor_fg"), fisher) < 1e-9


def test_criteria_of_weights_are_their_formulas():
    model, scores = made(residual, criteria=["taylor_weight"])
    train_on(model, [1])
    scale, square, taylor = (torch.zeros(len(scores.units)) for _ in range(3))
    conv_of = {layer: layer.replace("bn", "conv") for layer in scores.coupling.layers} | {
        "1": "0",
        "4.down.1": "4.down.0",
    }
    for u, unit in enumerate(scores.units):
        for layer, c in unit.places:
            weight = model.get_submodule(conv_of[layer]).weight
            scale[u] += model.get_submodule(layer).weight[c].detach().abs()
            square[u] += weight[c].detach().square().sum()
            taylor[u] += (weight[c] * weight.grad[c]).detach().square().sum()
    assert distance(scores.importance("bn_scale"), scale) < 1e-6
    assert distance(scores.importance("magnitude"), square.sqrt()) < 1e-6
    assert distance(scores.importance("taylor_weight"), taylor) < 1e-5


def test_every_criterion_gives_one_number_per_unit():
    for build in (residual, plain):
        model, scores = made(build, criteria=list(CRITERIA))
        x, target = batch(1)
        logits = model(x)
        scores.curvature(logits, target)
        nn.functional.cross_entropy(logits, target).backward()
        train_on(model, [2])
        for name in CRITERIA:
            importance = scores.importance(name)
            assert importance.shape == (len(scores.units),) and not importance.isnan().any(), name
            assert name.startswith("bn_") or importance.isfinite().all(), name


def test_a_criterion_that_can_not_judge_a_unit_never_ranks_it_low():
    model, scores = made(plain)
    train_on(model, [1])
    assert scores.importance("bn_scale").isinf().all() and scores.importance("bn_taylor").isinf().all()


def test_random_is_seeded():
    _, first = made(residual, seed=1)
    _, again = made(residual, seed=1)
    _, other = made(residual, seed=2)
    assert torch.equal(first.importance("random"), again.importance("random"))
    assert not torch.equal(first.importance("random"), other.importance("random"))


def test_a_non_finite_minibatch_is_dropped_whole_and_counted():
    model, scores = made(residual)
    model.eval()  # so that the NaN stays out of the running statistics
    train_on(model, [1])
    before = scores.importance("taylor_fo")
    x, target = batch(2)
    x[3, 0, 0, 0] = torch.nan
    nn.functional.cross_entropy(model(x), target).backward()
    assert scores.dropped == 1 and scores.minibatches == 1
    assert torch.equal(scores.importance("taylor_fo"), before)


def test_several_backwards_after_one_forward_are_one_minibatch():
    model, scores = made(residual)
    x, target = batch(1)
    loss = nn.functional.cross_entropy(model(x), target)
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    assert scores.minibatches == 1
    got = scores.importance("taylor_fo")
    scores.reset()
    train_on(model, [1])
    assert distance(got, scores.importance("taylor_fo")) < 1e-4


def test_batch_sizes_may_change_and_meet_in_one_minibatch():
    model, scores = made(residual, torch.float64)
    model.eval()
    train_on(model, [1], n=8)
    train_on(model, [2], n=3)
    assert scores.minibatches == 2
    scores.reset()
    first, second = expected(model, scores, [1], n=8)[0], expected(model, scores, [2], n=3)[0]
    batches = batch(1, 8, torch.float64), batch(2, 3, torch.float64)
    sum(nn.functional.cross_entropy(model(x), target) for x, target in batches).backward()
    assert scores.minibatches == 1
    assert distance(scores.importance("taylor_fo"), (first.sum(0) + second.sum(0)).square()) < 1e-9
    fisher = 8 * first.square().sum(0) + 3 * second.square().sum(0)
    assert distance(scores.importance("taylor_fg"), fisher) < 1e-9


def test_a_layer_called_twice_has_one_gate():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.conv, self.out = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            x = self.into(x).relu()
            return self.out(self.conv(self.conv(x).relu()).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = tk.convert(Twice().double())
    scores = tk.Scores(model, batch(0)[0].double())
    s = expected(model, scores, [1])
    train_on(model, [1])
    assert distance(scores.importance("taylor_fg"), 8 * s[0].square().sum(0)) < 1e-9


def test_compiled_models_fold_outside_compiled_code(monkeypatch):
    model, scores = made(residual)
    model.eval()
    train_on(model, [1, 2])
    want = scores.importance("taylor_fo")
    scores.reset()
    compiling, fold = [], Folding.__call__

    def watched(self, *pieces):
        compiling.append(torch.compiler.is_compiling())
        return fold(self, *pieces)

    monkeypatch.setattr(Folding, "__call__", watched)
    compiled = torch.compile(model, backend="eager")
    for seed in (1, 2):
        x, target = batch(seed)
        nn.functional.cross_entropy(compiled(x), target).backward()
    assert scores.minibatches == 2 and compiling == [False, False]
    assert distance(scores.importance("taylor_fo"), want) < 1e-5


def test_checkpointed_blocks_score_the_same():
    model, scores = made(residual)
    train_on(model, [1])
    want = scores.importance("taylor_fo")
    scores.reset()
    x, target = batch(1)
    hidden = checkpoint(model[:4], x, use_reentrant=False)
    nn.functional.cross_entropy(model[4:](hidden), target).backward()
    assert scores.minibatches == 1
    assert distance(scores.importance("taylor_fo"), want) < 1e-5


def test_reentrant_checkpoints_keep_minibatches_apart():
    model, scores = made(residual)
    x, target = batch(1)
    for _ in range(3):
        logits = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
        nn.functional.cross_entropy(logits, target).backward()
    assert scores.minibatches == 3


def test_weight_squares_are_those_of_the_minibatch_alone():
    model, scores = made(residual, torch.float64, criteria=["taylor_weight"])
    model.eval()
    x, target = batch(1, dtype=torch.float64)

    def loss():
        return nn.functional.cross_entropy(model(x), target)

    loss().backward()
    want = scores.importance("taylor_weight")
    (1e4 * loss()).backward()
    scores.reset()
    logits = model(x)
    for i in range(2):
        (nn.functional.cross_entropy(logits[i::2], target[i::2]) / 2).backward(retain_graph=True)
    assert scores.minibatches == 1
    assert distance(scores.importance("taylor_weight"), want) < 1e-9


def test_weight_hooks_go_with_their_scores():
    model, scores = made(residual, criteria=["taylor_weight"])
    weight = model[0].weight
    assert len(weight._backward_hooks) == 1
    with pytest.warns(UserWarning, match="detached"):
        second = tk.Scores(model, batch(0)[0], criteria=["taylor_weight"])
    assert len(weight._backward_hooks) == 1
    del second
    assert len(weight._backward_hooks) == 0 and scores.minibatches == 0
    tk.prune(model, batch(0)[0], torch.rand(len(scores.units)), target=0.7)
    train_on(model, [1])


def test_a_model_converted_in_part_is_refused():
    model = residual()
    tk.convert(model[3])
    with pytest.raises(ValueError, match=r"'1' and 3 more hold channels .* not converted"):
        tk.Scores(model, batch(0)[0])
    assert all(getattr(module, "gate", None) is None for module in model.modules())


def test_scores_of_a_reverted_model_say_why_nothing_comes():
    model, scores = made(residual)
    tk.revert(model)
    train_on(model, [1])
    with pytest.raises(RuntimeError, match="reverted"):
        scores.importance("taylor_fo")


def test_statistics_save_restore_and_refuse_another_model():
    model, scores = made(residual)
    train_on(model, [1, 2])
    state = scores.state_dict()
    _, fresh = made(residual)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.importance("taylor_fo"), scores.importance("taylor_fo")) and fresh.minibatches == 2
    _, other = made(plain)
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict(state)
    assert other.minibatches == 0


def test_without_an_example_every_channel_is_its_own_unit():
    model = tk.convert(residual())
    scores = tk.Scores(model, None, layers=["1", "3.bn1"])
    assert [unit.places for unit in scores.units] == [((layer, c),) for layer in ("1", "3.bn1") for c in range(6)]
    train_on(model, [1])
    assert scores.importance("taylor_fo").shape == (12,)
    with pytest.raises(ValueError, match="no gated layer of this model"):
        tk.Scores(model, None, layers=["nowhere"])


def test_scoring_stops_when_told_or_when_nobody_holds_the_scores():
    model, scores = made(residual)
    train_on(model, [1])
    scores.detach()
    train_on(model, [2])
    assert scores.minibatches == 1 and model[1].gate is None
    second = tk.Scores(model, batch(0)[0])
    assert model[1].gate.wanted()
    del second
    assert not model[1].gate.wanted()


def test_a_second_scores_takes_over_and_says_so():
    model, first = made(residual)
    with pytest.warns(UserWarning, match="already feeds another Scores, which is detached") as caught:
        second = tk.Scores(model, batch(0)[0])
    assert caught[0].filename == __file__
    train_on(model, [1])
    assert first.minibatches == 0 and second.minibatches == 1


def test_scoring_leaves_training_as_it_was():
    torch.manual_seed(0)
    plain_model = residual().double()
    scored = tk.convert(copy.deepcopy(plain_model))
    scores = tk.Scores(scored, batch(0)[0].double())
    for model in (plain_model, scored):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for seed in range(4):
            x, target = batch(seed, dtype=torch.float64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    assert scores.minibatches == 4
    for (name, a), b in zip(plain_model.state_dict().items(), scored.state_dict().values(), strict=True):
        assert distance(b, a) < 1e-9, name


def test_gates_without_gradient_are_named():
    model, scores = made(residual)
    x, _ = batch(1)
    model[:4](x).sum().backward()  # the second block never runs
    with pytest.warns(UserWarning, match="4.bn1") as caught:
        scores.importance("taylor_fo")
    assert caught[0].filename == __file__


def test_bad_input_is_refused_and_leaves_the_model_usable():
    x, target = batch(0)
    with pytest.raises(ValueError, match="convert"):
        tk.Scores(residual(), x)
    model = tk.convert(residual())
    with pytest.raises(ValueError, match="example"):
        tk.Scores(model, torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match="unknown criterion 'best'"):
        tk.Scores(model, x, criteria=["best"])
    with pytest.raises(ValueError, match="no unit"):
        tk.Scores(tk.convert(nn.Sequential(nn.Flatten(), nn.Linear(128, 5))), x)
    scores = tk.Scores(model, x)
    with pytest.raises(RuntimeError, match="no backward has reached a gate"):
        scores.importance("taylor_fo")
    with pytest.raises(ValueError, match=r"criteria=\['taylor_weight'\]"):
        scores.importance("taylor_weight")
    model.eval()
    (nn.functional.cross_entropy(model(x), target) * torch.nan).backward()
    with pytest.raises(RuntimeError, match="all 1 minibatches had non-finite"):
        scores.importance("taylor_fo")
    train_on(model, [1])
    assert scores.importance("taylor_fo").isfinite().all()


class Argmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = residual()

    def forward(self, x):
        return self.net(x).argmax(1)


class Detached(Argmax):
    def forward(self, x):
        return self.net(x).detach()


@pytest.mark.parametrize("build", [Argmax, Detached])
def test_a_model_that_returns_nothing_differentiable_is_refused(build):
    model = tk.convert(build())
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"differentiated|no unit"):
        warnings.simplefilter("error")
        tk.Scores(model, batch(0)[0])
    assert all(getattr(module, "gate", None) is None for module in model.modules())


def output_shares(model, scores, x, target, backwards=1):
    """mean over n and S of abs(a·dL/da), [U, layers], by hooks on an unconverted copy without in-place operations."""
    wide = tk.revert(copy.deepcopy(model))
    for module in wide.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    kept = {}

    def keep(layer):
        def hook(module, inputs, output):
            kept[layer] = output
            return output.clone()  # the blocks add in place

        return hook

    layers = list(scores.coupling.layers)
    for layer in layers:
        wide.get_submodule(layer).register_forward_hook(keep(layer))
    gradients = torch.autograd.grad(nn.functional.cross_entropy(wide(x), target), [kept[layer] for layer in layers])
    shares = torch.zeros(len(scores.units), len(layers), dtype=torch.float64)
    for i, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
        mean = (kept[layer] * gradient).detach().abs().transpose(0, 1).flatten(1).mean(1)
        for u, unit in enumerate(scores.units):
            shares[u, i] = sum(mean[channel] for name, channel in unit.places if name == layer)
    return shares


@pytest.mark.parametrize("build", [residual, plain])
def test_taylor_output_is_normalised_per_layer_after_the_mean(build):
    """In-place ReLU and addition behind the layers, linked units, a curvature in between, several backwards."""
    model, scores = made(build, torch.float64, criteria=["taylor_output"])
    model.eval()
    shares = []
    for seed in (1, 2):
        x, target = batch(seed, dtype=torch.float64)
        shares.append(output_shares(model, scores, x, target))
        logits = model(x)
        scores.curvature(logits, target)
        for i in range(2):
            (nn.functional.cross_entropy(logits[i::2], target[i::2]) / 2).backward(retain_graph=True)
    mean = torch.stack(shares).mean(0)
    want = (mean / mean.square().sum(0).sqrt()).sum(1)
    assert distance(scores.importance("taylor_output"), want) < 1e-12
    assert build is plain or any(len(unit.places) > 1 for unit in scores.units)


def test_taylor_output_follows_a_cut():
    torch.manual_seed(0)
    model = tk.convert(residual())
    pruner = tk.Pruner(model, batch(0)[0], criterion="taylor_output", target=0.6, of="channels", every=2, step=3)
    before = len(pruner.scores.units)
    while not pruner.done:
        train_on(model, [1])
        pruner.step()
    assert len(pruner.scores.units) < before
    train_on(model, [2])
    assert pruner.scores.importance("taylor_output").shape == (len(pruner.scores.units),)


def test_predicted_changes_keep_their_sign():
    model, scores = made(residual, torch.float64)
    model.eval()
    s = expected(model, scores, [1, 2])
    train_on(model, [1, 2])
    gate, fisher = s.sum(1).mean(0), 8 * s.square().sum(1).mean(0)
    assert distance(scores.predicted_change("taylor_fo"), -gate) < 1e-12
    assert distance(scores.predicted_change(), fisher / 2 - gate) < 1e-12
    assert (gate < 0).any() and (gate > 0).any()
    with pytest.raises(ValueError, match=r"'magnitude' predicts no signed change; those that do are taylor_fo"):
        scores.predicted_change("magnitude")
    with pytest.raises(RuntimeError, match="no curvature yet"):
        scores.predicted_change("taylor_so")


@pytest.mark.parametrize("name", ["taylor_output", "taylor_weight", "taylor_fo"])
def test_gradients_that_somebody_takes_away_are_no_scores(name):
    """A saliency map, a gradient penalty, a curvature: nothing of them may join a minibatch's statistics."""
    model, scores = made(residual, torch.float64, criteria=["taylor_output", "taylor_weight"])
    model.eval()
    x, target = batch(1, dtype=torch.float64)
    nn.functional.cross_entropy(model(x), target).backward()
    want = scores.importance(name)
    scores.reset()
    logits = model(x.requires_grad_())
    loss = nn.functional.cross_entropy(logits, target)
    torch.autograd.grad(100 * loss, x, retain_graph=True)
    torch.autograd.grad(100 * loss, list(model.parameters()), retain_graph=True)
    scores.curvature(logits, target)
    loss.backward()
    assert scores.minibatches == 1
    assert distance(scores.importance(name), want) < 1e-12


def test_copies_and_pickles_of_a_model_scored_by_its_outputs_score_nothing():
    model, scores = made(residual, criteria=["taylor_output", "taylor_weight"])
    train_on(model, [1])
    want = scores.importance("taylor_output")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train_on(other, [2])
    assert scores.minibatches == 1 and torch.equal(scores.importance("taylor_output"), want)


def test_a_transposed_convolution_in_groups_can_be_scored_channel_by_channel():
    model = tk.convert(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 3)))
    scores = tk.Scores(model, None, layers=["0"], criteria=["taylor_weight"])
    model(torch.randn(2, 4, 2, 2)).square().mean().backward()
    assert scores.importance("taylor_fo").isfinite().all()
    assert scores.importance("magnitude").isposinf().all() and scores.importance("taylor_weight").isposinf().all()
