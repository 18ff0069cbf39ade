"""Checkpoints bring a training back to the bit, or say what does not fit before anything changes."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import taylorkern as tk
from tests.checkpointed import Linear, Training, assert_same_bits

OPTIONS = {
    "cut": {},
    "masked": {"mode": "mask"},
    "smoothed": {"momentum": 0.5, "of": "params"},
    "surgeon": {"criterion": "surgeon"},
    "surgeon by a reservoir that has overflown": {"criterion": "surgeon", "gram": "reservoir", "batch": 1500},
    "masked by the surgeon in blocks": {"criterion": "surgeon", "gram": "blocks", "mode": "mask"},
    "curvature in every third step": {"criterion": "taylor_so", "every_n": 3, "every": 5},
    "surgeon by a curvature": {"criterion": "surgeon", "every_n": 2, "compensate": True},
    "weights": {"criterion": "taylor_weight", "compensate": True},
    "outputs": {"criterion": "taylor_output"},
    "random": {"criterion": "random", "seed": 3},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, options):
    whole = Training(tmp_path / "whole", 24, **OPTIONS[options]).run(every=0)
    assert whole.pruner.kept < 1
    for stop in (3, 8, 15):
        folder = tmp_path / str(stop)
        Training(folder, 24, **OPTIONS[options]).run(stop, every=stop)
        again = Training(folder, 24, **OPTIONS[options]).resume()
        assert again.done_steps == stop
        again.run(every=0)
        assert_same_bits(whole.checkpoints.state_dict(), again.checkpoints.state_dict())


def test_extra_and_its_step_come_back_and_an_empty_folder_gives_none(tmp_path):
    extra = {"epoch": 2, "losses": [1.5, 0.5], "name": "run", "best": torch.arange(3), "nested": {"a": (1, None)}}
    run = Linear(tmp_path / "made" / "here")
    assert run.checkpoints.load() is None
    assert not (tmp_path / "made").exists()
    run.checkpoints.save(7, **extra)
    assert_same_bits(Linear(tmp_path / "made" / "here").checkpoints.load(), extra | {"step": 7})


def test_random_states_go_on(tmp_path):
    def draws():
        return random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()

    np.random.standard_normal()  # NumPy keeps a second one for the next call
    run = Linear(tmp_path).saved(1)
    before = draws()
    assert draws() != before
    run.checkpoints.load()
    assert draws() == before


def test_another_generator_of_numpy_is_seen_before_anything_changes(tmp_path):
    run = Linear(tmp_path).saved(1)
    nn.init.constant_(run.model.weight, 5)
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        with pytest.raises(ValueError, match="NumPy drew by MT19937"):
            run.checkpoints.load()
        assert (run.model.weight == 5).all()
        run.checkpoints.save(2)
        want = np.random.rand()
        run.checkpoints.load()
        assert np.random.rand() == want
    finally:
        np.random.set_bit_generator(before)


def test_whatever_has_a_state_is_a_part(tmp_path):
    class Sampler:
        position = 0

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

    def parts():
        return {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0), "sampler": Sampler(), "g": torch.Generator()}

    first = parts()
    first["scaler"].scale(torch.ones(1)), first["g"].manual_seed(3)
    first["scaler"].update(16.0)
    first["sampler"].position = 5
    tk.Checkpoints(tmp_path, **first).save(1)
    want = torch.rand(2, generator=first["g"])
    second = parts()
    tk.Checkpoints(tmp_path, **second).load()
    assert second["sampler"].position == 5 and second["scaler"].get_scale() == 16.0
    assert torch.equal(torch.rand(2, generator=second["g"]), want)


def test_the_state_is_one_dict_for_files_of_your_own(tmp_path):
    first = Training(tmp_path, 20).run(8, every=0)
    torch.save(first.checkpoints.state_dict(), tmp_path / "own")
    second = Training(tmp_path, 20)
    second.checkpoints.load_state_dict(torch.load(tmp_path / "own", weights_only=True))
    assert_same_bits(first.checkpoints.state_dict(), second.checkpoints.state_dict())
    with pytest.raises(ValueError, match="format 2, known is 1"):
        second.checkpoints.load_state_dict(second.checkpoints.state_dict() | {"format": 2})


def altered(change):
    def build(folder):
        training = Training(folder, 12)
        training.pruner.scores.detach()
        change(training)
        training.checkpoints = tk.Checkpoints(folder, **training.parts())
        return training

    return build


def another_model(training):
    training.model = nn.Sequential(*[*training.model][:-1], nn.Linear(160, 5, bias=False))
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.pruner = tk.Pruner(training.model, torch.zeros(2, 2, 8, 8), optimizer=training.optimizer)


def another_group(training):
    training.optimizer = torch.optim.SGD([{"params": [p]} for p in training.model.parameters()], lr=0.1)
    training.pruner = tk.Pruner(training.model, torch.zeros(2, 2, 8, 8), optimizer=training.optimizer)


MISFITS = {
    "names": (
        lambda folder: altered(lambda run: setattr(run, "parts", lambda: {"net": run.model}))(folder),
        "same parts",
    ),
    "model": (altered(another_model), "part 'model' does not fit its state: only one of them has 7.bias"),
    "optimizer": (altered(another_group), r"part 'optimizer' does not fit its state: its groups have \[1, 1"),
    "criterion": (lambda folder: Training(folder, 12, criterion="taylor_weight"), "part 'pruner' .*nothing was loaded"),
    "gram": (lambda folder: Training(folder, 12, criterion="surgeon"), r"part 'pruner' .*nothing was loaded"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_seen_before_anything_changes(tmp_path, misfit):
    build, told = MISFITS[misfit]
    Training(tmp_path, 12).run()
    other = build(tmp_path)
    before, chance = copy.deepcopy(other.checkpoints.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=told):
        other.checkpoints.load()
    torch.set_rng_state(chance)
    assert_same_bits(before, other.checkpoints.state_dict())


def test_another_width_without_a_pruner_is_seen_before_anything_changes(tmp_path):
    Linear(tmp_path).saved(1)
    wide = nn.Linear(4, 2)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(ValueError, match=r"its weight is \[2, 4\], the state's \[2, 3\]"):
        tk.Checkpoints(tmp_path, model=wide).load()
    assert_same_bits(before, wide.state_dict())


def test_a_part_that_refuses_is_named(tmp_path):
    class Picky(nn.Module):
        def get_extra_state(self):
            return {"kept": 1}

        def set_extra_state(self, state):
            raise KeyError("that is too old")

    tk.Checkpoints(tmp_path, first=nn.Linear(1, 1), last=Picky()).save(1)
    with pytest.raises(ValueError, match=r"part 'last' refused its state \(first had been loaded\): .*too old"):
        tk.Checkpoints(tmp_path, first=nn.Linear(1, 1), last=Picky()).load()


def test_parts_that_are_none_are_refused(tmp_path):
    training = Training(tmp_path)
    model, optimizer, pruner = training.model, training.optimizer, training.pruner
    refused = {
        "nothing to keep": {},
        "scaler= is a NoneType": {"scaler": None},
        "model= is a DataParallel; give the model inside, model.module": {"model": nn.DataParallel(model)},
        "model= is compiled": {"model": torch.compile(model)},
        "pruner= cuts a model that is none": {"pruner": pruner, "optimizer": optimizer},
        "pruner= cuts an optimizer that is none": {"pruner": pruner, "model": model},
        "pruner= cuts a copy of the model that is none": {"pruner": pruner, "model": model, "optimizer": optimizer},
        "keep=0 must be": {"model": model, "keep": 0},
    }
    for told, parts in refused.items():
        with pytest.raises(ValueError, match=told):
            tk.Checkpoints(tmp_path, **parts)
    task = nn.ModuleDict({"net": model})
    tk.Checkpoints(tmp_path, task=task, optimizer=optimizer, pruner=pruner, average=training.average)
    with pytest.raises(ValueError, match="step=-1 must be a whole number"):
        training.checkpoints.save(-1)


def test_nothing_warns_in_an_undisturbed_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Training(tmp_path, 12).run()
        Training(tmp_path, 12).resume()


@pytest.fixture
def two_devices(monkeypatch):
    """What of two CUDA devices the random states go by; their states are whole numbers here."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [states[0].clone(), states[1].clone()])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    return states


def test_the_random_states_of_all_devices_go_on(tmp_path, two_devices):
    run = Linear(tmp_path).saved(1)
    two_devices.update({0: torch.tensor([20]), 1: torch.tensor([21])})
    run.checkpoints.load()
    assert [int(state) for state in two_devices.values()] == [10, 11]


def test_fewer_devices_are_told_of(tmp_path, two_devices):
    run = Linear(tmp_path).saved(1)
    two_devices[0] = torch.tensor([20])
    del two_devices[1]
    with pytest.warns(UserWarning, match="2 CUDA devices had random states, here are 1"):
        run.checkpoints.load()
    assert {device: int(state) for device, state in two_devices.items()} == {0: 10}
