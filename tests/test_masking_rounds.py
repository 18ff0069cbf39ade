"""Rounds that mask, and cut some day, choose and train as rounds that cut at once."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taylorkern as tk
from taylorkern.masks import mask_of, masked_units
from tests.goingon import Mixed, batch
from tests.networks import randomised, residual

X = batch(0)[0][:2]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
}


class Rounds:
    """A run with a pruner, its average and its optimiser; ``kept`` is the pruner's after every step."""

    def __init__(self, build=residual, optimizer="sgd", **options) -> None:
        torch.manual_seed(0)
        self.model = tk.convert(randomised(build()).double())
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        options = {"every": 3, "step": 3, "target": 0.5} | options
        self.pruner = tk.Pruner(self.model, X, optimizer=self.optimizer, copies=self.average, **options)
        self.kept, self.removed = [], []

    def train(self, steps, cut_after=()) -> "Rounds":
        for step in steps:
            x, target = batch(step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), target).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.removed.append(len(self.pruner.step()))
            self.average.update_parameters(self.model)
            self.kept.append((self.pruner.kept, self.pruner.done))
            if step in cut_after:
                self.pruner.cut()
        return self

    def tensors(self):
        states = [s for p in self.model.parameters() for s in self.optimizer.state[p].values() if torch.is_tensor(s)]
        return [*self.model.state_dict().values(), *self.average.state_dict().values(), *states]


def assert_alike(cutting: Rounds, masking: Rounds) -> None:
    assert cutting.kept == masking.kept
    assert torch.equal(cutting.pruner.scores.coupling.dense, masking.pruner.scores.coupling.dense)
    for a, b in zip(cutting.tensors(), masking.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


OPTIONS = {
    "taylor_fo": {},
    "smoothed": {"momentum": 0.5, "of": "params"},
    "output": {"criterion": "taylor_output", "of": "channels", "min_channels": 2},
    "weight": {"criterion": "taylor_weight"},
    "magnitude": {"criterion": "magnitude", "of": "params"},
    "random": {"criterion": "random"},
    "surgeon": {"criterion": "surgeon"},
    "surgeon in blocks": {"criterion": "surgeon", "gram": "blocks", "of": "params", "bound": 0.5},
    "compensated": {"compensate": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masking_in_every_round_and_cutting_at_the_end_is_cutting_in_every_round(optimizer, options):
    cutting, masking = (Rounds(optimizer=optimizer, mode=mode, **OPTIONS[options]) for mode in ("cut", "mask"))
    cutting.train(range(24))
    masking.train(range(24))
    assert cutting.pruner.done and sum(cutting.removed) > 6
    scored, shapes = masking.pruner.scores, [p.shape for p in masking.model.parameters()]
    assert len(scored.units) == len(Rounds().pruner.scores.units)
    expected = masking.model.eval()(X)
    units = list(scored.units)
    went = masking.pruner.cut()
    assert cutting.removed == masking.removed
    assert len(went) == sum(masking.removed) and set(went) <= set(units)
    assert (masking.model(X) - expected).abs().max() < 1e-12
    assert shapes != [p.shape for p in masking.model.parameters()]
    assert_alike(cutting, masking)
    assert masking.pruner.cut() == []


@pytest.mark.parametrize("build", [residual, Mixed])
def test_cuts_on_the_way_and_another_mode_from_there_make_no_difference(build):
    cutting = Rounds(build, target=0.4).train(range(30))
    between = Rounds(build, target=0.4, mode="mask").train(range(30), cut_after=(6, 13))
    between.pruner.cut()
    changing = Rounds(build, target=0.4, mode="mask").train(range(7))
    changing.pruner.mode = "cut"
    changing.train(range(7, 30))
    assert changing.removed[5:9] == [
        cutting.removed[5],
        0,
        0,
        sum(cutting.removed[:9]),
    ]  # what is masked goes with the next cut
    for other in (between, changing):
        assert mask_of(other.model) is None
        assert_alike(cutting, other)


def test_masked_units_are_left_out_of_everything_but_their_numbers():
    masking = Rounds(mode="mask", min_channels=2, target=0.3, step=5)
    coupling, seen = masking.pruner.scores.coupling, set()
    for step in range(60):
        masking.train([step])
        masked = set(masked_units(masking.model, coupling).tolist())
        assert len(masked - seen) == masking.removed[-1] and seen <= masked
        seen = masked
    stays = coupling.staying(torch.tensor(sorted(seen)))
    widths = [int(stays[units].sum()) for units in (*coupling.axes.values(), *coupling.layers.values())]
    assert masking.pruner.done and min(widths) == 2
    with pytest.raises(RuntimeError, match="no unit may go any more"):
        masking.pruner.target = 0.01
        masking.train(range(60, 200))


def test_statistics_count_on_after_a_cut_between_rounds():
    masking = Rounds(mode="mask", every=4).train(range(6))
    before = masking.pruner.scores.importance("taylor_fo")
    kept = masking.pruner._living.units
    assert masking.pruner.scores.minibatches == 2
    masking.pruner.cut()
    assert masking.pruner.scores.minibatches == 2
    assert torch.equal(masking.pruner.scores.importance("taylor_fo"), before[kept])


@pytest.mark.parametrize("stop", [2, 4, 9, 14])
@pytest.mark.parametrize("criterion", ["taylor_fo", "surgeon"])
def test_a_resumed_run_ends_with_the_same_bits(stop, criterion):
    options = {"mode": "mask", "target": 0.4, "criterion": criterion}
    whole = Rounds(optimizer="adamw", **options).train(range(stop), cut_after=(6,))
    file = io.BytesIO()
    parts = ("pruner", "model", "optimizer", "average")
    torch.save({part: getattr(whole, part).state_dict() for part in parts}, file)
    whole.train(range(stop, 24))
    file.seek(0)
    states, again = torch.load(file, weights_only=True), Rounds(optimizer="adamw", **options)
    for part in parts:
        getattr(again, part).load_state_dict(states[part])
    again.train(range(stop, 24))
    for one in (whole, again):
        one.pruner.cut()
    assert torch.equal(whole.pruner.scores.coupling.dense, again.pruner.scores.coupling.dense)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), again.tensors(), strict=True))


def test_a_state_from_before_there_were_masks_loads():
    whole = Rounds().train(range(7))
    state = whole.pruner.state_dict()
    assert len(state.pop("masked")) == 0
    again = Rounds(mode="mask")
    again.pruner.load_state_dict(state)
    assert torch.equal(whole.pruner.scores.coupling.dense, again.pruner.scores.coupling.dense)
    assert again.pruner.kept == whole.pruner.kept


def test_a_state_of_units_that_are_masked_here_changes_nothing():
    masked, fresh = Rounds(mode="mask").train(range(7)), Rounds()
    before, units = copy.deepcopy(masked.model.state_dict()), mask_of(masked.model).units
    with pytest.raises(ValueError, match="lacks units"):
        masked.pruner.load_state_dict(fresh.pruner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), masked.model.state_dict().values(), strict=True))
    assert torch.equal(mask_of(masked.model).units, units)


def test_weights_that_come_back_are_masked_by_the_next_step():
    masking = Rounds(mode="mask", every=4)
    state = copy.deepcopy(masking.model.state_dict())
    masking.train(range(5))
    weights = [masking.model.get_parameter(name) for name, _ in masking.pruner.scores.coupling.consumers]
    expected = [weight.eq(0) for weight in weights]
    assert sum(int(zero.sum()) for zero in expected) > 50
    masking.model.load_state_dict(state)
    assert not any(weight.eq(0).any() for weight in weights)
    masking.pruner.step()
    assert all(torch.equal(weight.eq(0), zero) for weight, zero in zip(weights, expected, strict=True))


def test_one_shot_masks_add_up_to_one_shot_cuts():
    models = {mode: tk.convert(residual().double()) for mode in ("cut", "mask")}
    models["mask"].load_state_dict(models["cut"].state_dict())
    importance = torch.rand(36, generator=torch.Generator().manual_seed(1))
    dense, seen = tk.couple(models["cut"], X), torch.arange(36)
    for target in (0.8, 0.7):
        averages = {mode: AveragedModel(model) for mode, model in models.items()}
        cut = tk.prune(models["cut"], X, importance[seen], target=target, copies=averages["cut"])
        masked = tk.prune(models["mask"], X, importance, target=target, mode="mask", copies=averages["mask"])
        assert len(cut) == len(masked) and set(masked) <= set(dense.units)
        seen = (~torch.isin(torch.arange(36), masked_units(models["mask"], dense))).nonzero().flatten()
        a, b = (averages[mode].eval()(X) for mode in models)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert models["mask"][3].conv1.weight.shape == (6, 6, 3, 3)
    went = tk.prune(models["mask"], X, importance, target=1.0)
    assert len(went) == 36 - len(seen) and mask_of(models["mask"]) is None
    assert all(torch.equal(a, b) for a, b in zip(models["cut"].parameters(), models["mask"].parameters(), strict=True))


def test_a_new_pruner_counts_what_is_masked_as_gone():
    model = tk.convert(residual().double())
    tk.prune(model, X, torch.rand(36), target=0.7, mode="mask")
    thin = copy.deepcopy(model)
    cut = tk.surgery.cut(thin, tk.couple(thin, X), mask_of(model).units, X)
    pruners = tk.Pruner(model, X, of="params"), tk.Pruner(thin, X, of="params")
    assert pruners[0].kept == 1.0 and pruners[0]._meter.total == pruners[1]._meter.total
    assert pruners[0]._dense.fingerprint == pruners[1]._dense.fingerprint == cut.fingerprint


def test_an_unknown_mode_is_named():
    model = tk.convert(residual())
    with pytest.raises(ValueError, match="mode='hide' is not one of cut, mask"):
        tk.Pruner(model, X.float(), mode="hide")
    with pytest.raises(ValueError, match="mode='hide'"):
        tk.prune(model, X.float(), torch.rand(36), mode="hide")
