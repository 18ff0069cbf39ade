"""The pruner: rounds, targets, optimisers that go on, resuming, and errors that leave everything usable."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import taylorkern as tk
from tests.cases import distance
from tests.networks import plain, residual

X = torch.ones(2, 2, 8, 8)


def batch(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def made(build=residual, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = tk.convert(build())
    opt = optimizer(model.parameters(), 0.01, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    return model, opt, tk.Pruner(model, X, optimizer=opt, **options)


def train(model, optimizer, pruner, steps):
    removed = []
    for seed in steps:
        x, target = batch(seed)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        removed.append(pruner.step())
    return removed


def flops(model):
    with FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_rounds_come_every_so_often_and_stop_at_the_target(optimizer):
    model, opt, pruner = made(optimizer=optimizer, every=3, step=4, target=0.5)
    dense = flops(model)
    removed = train(model, opt, pruner, range(60))
    rounds = [i for i, units in enumerate(removed) if units]
    assert all((i + 1) % 3 == 0 for i in rounds) and rounds == list(range(2, rounds[-1] + 1, 3))
    assert all(len(removed[i]) == 4 for i in rounds[:-1]) and 1 <= len(removed[rounds[-1]]) <= 4
    assert pruner.done and pruner.kept <= 0.5
    assert flops(model) / dense == pytest.approx(pruner.kept, rel=1e-9)
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state[p]
            assert all(t.shape == p.shape for t in state.values() if torch.is_tensor(t) and t.dim())


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("of,measure", [("params", params), ("flops", flops)])
def test_the_target_is_what_is_kept(of, measure):
    model, opt, pruner = made(every=1, step=1, target=0.6, of=of)
    dense = measure(model)
    train(model, opt, pruner, range(40))
    assert pruner.done and 0.5 < measure(model) / dense <= 0.6


def test_a_target_of_channels_counts_units():
    model, opt, pruner = made(every=1, step=5, target=0.5, of="channels")
    units = len(pruner.scores.units)
    train(model, opt, pruner, range(20))
    assert len(pruner.scores.units) == units // 2


def test_the_least_important_units_go():
    model, opt, pruner = made(every=2, step=3, target=0.5)
    train(model, opt, pruner, [1])
    x, target = batch(2)
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    opt.step()
    importance = pruner.scores.importance("taylor_fo")
    lowest = {pruner.scores.units[i].places for i in importance.argsort()[:3].tolist()}
    assert {unit.places for unit in pruner.step()} == lowest


@pytest.mark.parametrize(
    "criterion", ["taylor_fg", "taylor_fo_abs", "taylor_weight", "magnitude", "random", "bn_scale"]
)
def test_every_criterion_prunes(criterion):
    model, opt, pruner = made(every=2, step=5, target=0.5, criterion=criterion)
    train(model, opt, pruner, range(30))
    assert pruner.done


def test_momentum_smooths_importances_over_rounds():
    model, opt, pruner = made(every=1, step=1, target=0.5, momentum=0.75)
    train(model, opt, pruner, [1])
    before = pruner._selection.smoothed.clone()
    x, target = batch(2)
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    opt.step()
    now = pruner.scores.importance("taylor_fo")
    units = list(pruner.scores.units)
    gone = {unit.places for unit in pruner.step()}
    kept = [i for i, unit in enumerate(units) if unit.places not in gone]
    assert distance(pruner._selection.smoothed, (0.75 * before + 0.25 * now)[kept]) < 1e-12


def bits(model, optimizer):
    state = optimizer.state_dict()["state"]
    moments = [t for entry in state.values() for t in entry.values() if torch.is_tensor(t)]
    return [*model.state_dict().values(), *moments]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 11])
def test_a_resumed_run_ends_with_the_same_bits(stop, optimizer):
    options = {"optimizer": optimizer, "every": 3, "step": 3, "target": 0.4, "momentum": 0.5}
    model, opt, pruner = made(**options)
    train(model, opt, pruner, range(stop))
    file = io.BytesIO()
    states = {"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": opt.state_dict()}
    torch.save(states, file)
    train(model, opt, pruner, range(stop, 24))

    file.seek(0)
    states = torch.load(file, weights_only=True)
    again, opt_again, pruner_again = made(**options)
    pruner_again.load_state_dict(states["pruner"])
    again.load_state_dict(states["model"])
    opt_again.load_state_dict(states["optimizer"])
    train(again, opt_again, pruner_again, range(stop, 24))
    assert [u.places for u in pruner.scores.units] == [u.places for u in pruner_again.scores.units]
    for a, b in zip(bits(model, opt), bits(again, opt_again), strict=True):
        assert torch.equal(a, b)


def test_states_of_another_model_change_nothing():
    model, opt, pruner = made()
    _, _, other = made(plain)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="another model"):
        pruner.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    train(model, opt, pruner, range(2))


@pytest.mark.parametrize(
    "other",
    [{"target": 0.6}, {"every": 3}, {"momentum": 0.5}, {"compensate": True}, {"of": "params"}, {"criterion": "obd"}],
    ids=str,
)
def test_a_state_of_other_settings_is_refused_by_their_names(other):
    _, _, pruner = made(every=2)
    _, _, again = made(**{"every": 2, **other})
    [name] = other
    with pytest.raises(ValueError, match=f"{name}=.*here {name}="):
        again.load_state_dict(pruner.state_dict())


def test_a_target_may_be_changed_after_loading():
    _, _, pruner = made(target=0.5)
    for _ in range(2):  # whoever sets it may stop and go on again
        _, _, again = made(target=0.5)
        again.load_state_dict(pruner.state_dict())
        again.target = 0.3
        pruner = again
    assert not pruner.done


def test_a_state_without_the_needed_statistics_changes_nothing():
    model, opt, pruner = made(every=1, step=2)
    train(model, opt, pruner, [1])
    fresh, _, other = made(every=1, step=2, criterion="taylor_weight")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match="weight_squared"):
        other.load_state_dict({name: kept for name, kept in pruner.state_dict().items() if name != "settings"})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), fresh.state_dict().values(), strict=True))


def test_states_loaded_in_the_wrong_order_say_the_right_one():
    options = {"every": 1, "step": 2}
    model, opt, pruner = made(**options)
    train(model, opt, pruner, [1])
    _, opt_again, pruner_again = made(**options)
    opt_again.load_state_dict(opt.state_dict())
    with pytest.raises(tk.SurgeryError, match="load the pruner's state before the optimiser's"):
        pruner_again.load_state_dict(pruner.state_dict())


def test_an_optimiser_with_state_of_all_parameters_in_one_is_refused():
    model = tk.convert(residual())
    opt = torch.optim.LBFGS(model.parameters(), 0.01, max_iter=2)
    x, target = batch(1)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        return loss

    opt.step(closure)
    with pytest.raises(tk.SurgeryError, match="LBFGS's"):
        tk.prune(model, X, torch.rand(len(tk.couple(model, X).units)), target=0.6, optimizer=opt)
    opt.step(closure)


def test_one_shot_cuts_the_lowest_and_scores_follow():
    torch.manual_seed(0)
    model = tk.convert(residual())
    dense = flops(model)
    scores = tk.Scores(model, X)
    x, target = batch(1)
    nn.functional.cross_entropy(model(x), target).backward()
    importance = scores.importance("taylor_fo")
    removed = tk.prune(model, X, importance, target=0.5)
    assert flops(model) <= 0.5 * dense and removed
    assert len(scores.units) == len(importance) - len(removed) and scores.minibatches == 1
    nn.functional.cross_entropy(model(x), target).backward()
    assert scores.minibatches == 2 and scores.importance("taylor_fo").shape == (len(scores.units),)
    model(x).sum().backward()


def test_nothing_goes_where_nothing_must():
    model = tk.convert(residual())
    assert tk.prune(model, X, torch.rand(len(tk.couple(model, X).units)), target=1.0) == []
    assert made(target=1.0)[2].done


@pytest.mark.parametrize("target", [0.0, -0.5, 1.2, float("nan")])
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(ValueError, match="target"):
        made(target=target)
    with pytest.raises(ValueError, match="target"):
        tk.prune(residual(), X, torch.ones(24), target=target)


def test_unreachable_targets_are_refused_at_the_start():
    model = tk.convert(residual())
    with pytest.raises(ValueError, match="can't be reached"):
        tk.Pruner(model, X, target=0.001)
    with pytest.raises(ValueError, match="can't be reached"):
        tk.Pruner(model, X, target=0.9, min_channels=100)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="can't be reached"):
        tk.prune(model, X, torch.rand(len(tk.couple(model, X).units)), target=0.001)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(getattr(module, "gate", None) is None for module in model.modules())


@pytest.mark.parametrize(
    "options,text",
    [
        ({"criterion": "best"}, "unknown criterion"),
        ({"of": "bytes"}, "of='bytes'"),
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"step": 0}, "step=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"min_channels": 0}, "min_channels=0"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        made(**options)


def test_importances_that_do_not_fit_are_refused():
    model = tk.convert(residual())
    units = len(tk.couple(model, X).units)
    with pytest.raises(ValueError, match=f"{units} units"):
        tk.prune(model, X, torch.ones(units + 1))
    with pytest.raises(ValueError, match="unit 2 is NaN"):
        tk.prune(model, X, torch.ones(units).index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(ValueError, match="example_inputs"):
        tk.Pruner(model, None)


def test_a_round_of_nan_losses_says_so_and_the_next_one_goes_on():
    model, opt, pruner = made(every=2, step=2, target=0.5)
    model.eval()
    x, target = batch(1)
    for i in range(2):
        loss = nn.functional.cross_entropy(model(x), target) * torch.nan
        loss.backward()
        opt.zero_grad()
        if i == 0:
            assert pruner.step() == []
    with pytest.raises(RuntimeError, match="non-finite"):
        pruner.step()
    assert any(train(model, opt, pruner, range(2)))


def test_a_loss_never_backpropagated_says_so():
    model, _, pruner = made(every=1, target=0.5)
    nn.functional.cross_entropy(model(batch(1)[0]), batch(1)[1])
    with pytest.raises(RuntimeError, match="no backward has reached a gate"):
        pruner.step()


def test_one_shot_cuts_go_on_where_a_layer_is_down_to_its_last_channel():
    """Its unit can't go, and a new coupling would not count it; the Scores that followed the cuts does."""
    torch.manual_seed(0)
    model, x = tk.convert(residual()), torch.randn(4, 2, 8, 8)
    scores = tk.Scores(model, x)
    for left in (0.7, 0.5, 0.4, 0.3, 0.2):
        torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        target = left * scores.coupling.dense.max().add(1).item() / len(scores.units)
        importance = scores.importance("taylor_fo")
        importance[scores.coupling.layers["1"]] = 0  # the stem's channels first
        tk.prune(model, x, importance, target=min(1.0, target), of="channels")
        scores.reset()
    assert model[1].num_features == 1
    assert len(tk.couple(model, x).units) < len(scores.units)


def test_a_scores_whose_model_changed_behind_its_back_is_not_asked():
    model, x = tk.convert(residual()), torch.randn(4, 2, 8, 8)
    scores = tk.Scores(model, x)
    block = model[3]
    block.conv1, block.bn1, block.conv2 = tk.Conv2d(6, 5, 3, 1, 1), tk.BatchNorm2d(5), tk.Conv2d(5, 6, 3, padding=1)
    with pytest.raises(ValueError, match=f"but this model has {len(scores.units) - 1} units"):
        tk.prune(model, x, torch.rand(len(scores.units)), target=0.7)


def test_a_scores_of_other_units_is_detached_by_a_cut_and_keeps_what_it_has():
    model, x = tk.convert(residual()), torch.randn(4, 2, 8, 8)
    scores = tk.Scores(model, None, layers=["1"])
    torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    units = len(tk.couple(model, x).units)
    with pytest.warns(UserWarning, match="can't follow") as caught:
        tk.prune(model, x, torch.rand(units), target=0.7)
    assert caught[0].filename == __file__
    assert scores.importance("taylor_fo").shape == (6,) and model[1].gate is None
