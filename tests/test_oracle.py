"""The oracle: its ΔL is the cut network's loss less the dense one's, and what the expansions tend to."""

import copy
import doctest
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from bench.study import networks as study
from bench.zoo import torchvision
from taylorkern import files, measurements
from taylorkern.oracle import WHOLE, Minibatch, _precision
from taylorkern.surgery import cut
from tests.cases import distance, normal
from tests.networks import plain, residual
from tests.test_scores import Argmax


def batch(seed):
    return normal((6, 2, 8, 8), seed, torch.float64), torch.arange(6) % 5


def made(build):
    torch.manual_seed(0)
    return build().double().eval()


@pytest.mark.parametrize("build", [residual, plain])
def test_the_measured_change_is_that_of_a_cut_where_a_zero_stays_a_zero(build):
    """Behind BN and ReLU a closed gate feeds the consumers zeros, as a cut channel does."""
    model = made(build)
    x, target = batch(1)
    changes = tk.oracle(model, x, F.cross_entropy, [(x, target)])[0]
    coupling, dense = tk.couple(model, x), F.cross_entropy(model(x), target)
    for u in range(0, len(coupling.units), 5):
        thin = copy.deepcopy(model)
        cut(thin, coupling, [u], x)
        assert distance(changes[u], F.cross_entropy(thin(x), target) - dense) < 1e-9


def test_units_measured_together_or_one_by_one_are_the_same():
    model, batches = made(residual), [batch(1), batch(2)]
    one = tk.oracle(model, batches[0][0], F.cross_entropy, batches, together=1)
    for together in (4, 7, 1000):
        assert distance(tk.oracle(model, batches[0][0], F.cross_entropy, batches, together=together), one) < 1e-9
    some = tk.oracle(model, batches[0][0], F.cross_entropy, batches, units=[5, 2])
    assert distance(some, one[:, [5, 2]]) < 1e-9


def test_it_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(residual(), nn.Dropout(0.5)).double().train()
    x, target = batch(1)
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = tk.oracle(model, x, F.cross_entropy, [(x, target)])
    assert torch.equal(first, tk.oracle(model, x, F.cross_entropy, [(x, target)]))
    assert model.training and torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(not module._forward_hooks for module in model.modules())


def test_second_order_foretells_better_than_first():
    """Not a study: one small network whose loss is near enough to its expansion."""
    model = tk.convert(made(residual))
    batches = [batch(seed) for seed in range(4)]
    truth = tk.oracle(model, batches[0][0], F.cross_entropy, batches).square().mean(0)
    scores = tk.Scores(model, batches[0][0])
    for x, target in batches:
        logits = model(x)
        scores.curvature(logits, target, method="exact")
        F.cross_entropy(logits, target).backward()
    correlation = {
        name: float(torch.corrcoef(torch.stack([truth, scores.importance(name)]))[0, 1])
        for name in ("taylor_fo", "taylor_so")
    }
    assert correlation["taylor_so"] > correlation["taylor_fo"]


def test_what_it_can_not_measure_is_refused():
    x, target = batch(1)
    with pytest.raises(ValueError, match="no unit"):
        tk.oracle(nn.Sequential(nn.Flatten(), nn.Linear(128, 5)).double(), x, F.cross_entropy, [(x, target)])

    class Named(Argmax):
        def forward(self, x):
            return {"logits": self.net(x)}

    named = Named().double().eval()

    def loss(output, target):
        return F.cross_entropy(output["logits"], target)

    with pytest.raises(ValueError, match="pass together=1"):
        tk.oracle(named, x, loss, [(x, target)])
    assert tk.oracle(named, x, loss, [(x, target)], together=1).isfinite().all()


SAMPLES, TOGETHER = 6, 7
CHECKS = 8  # losses beyond those of the units, in a minibatch: the whole's beside them, a unit's alone, 3 noisy of each


class StoppedError(Exception):
    pass


def stopping_after(calls):
    """The mean cross-entropy, ``calls`` times."""
    left = iter(range(calls))

    def loss(output, target):
        if next(left, None) is None:
            raise StoppedError
        return F.cross_entropy(output, target)

    return loss


def measured(model, batches, file, loss=F.cross_entropy, **options):
    """The oracle's changes, and how many copies of a minibatch ran for them; the example is of one sample."""
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[0]))
    try:
        changes = tk.oracle(model, batches[0][0][:1], loss, batches, file=file, **{"together": TOGETHER, **options})
    finally:
        hook.remove()
    return changes, sum(size // SAMPLES for size in sizes if size >= SAMPLES)


def columns_measured(file):
    return int(safetensors.torch.load_file(file)["measured"].sum())


def copies_to_run(file, minibatches):
    """What is not measured; beside a row's first group the whole runs too, and a unit of the first one done, alone."""
    known = safetensors.torch.load_file(file)["measured"]
    measured = torch.zeros(minibatches, known.shape[1], dtype=torch.bool)
    measured[: len(known)] = known
    missing = ~measured
    return int(missing.sum() + missing[:, 1].sum() + (missing[:, 1:].sum(1) > 1).sum())


# The first minibatch, of 36 units, ends at 1 + 36 + 8 losses; its first group is kept after 1 + 7 + 8.
@pytest.mark.parametrize("calls", [0, 1, 15, 16, 40, 44, 45, 46, 80])
def test_an_interrupted_oracle_goes_on_where_it_stopped(tmp_path, calls):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    whole, runs = measured(model, batches, None)
    columns = 2 * (1 + whole.shape[1])
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(calls))
    done = columns_measured(file)
    left = copies_to_run(file, 2)
    assert done >= calls - 2 * CHECKS - TOGETHER
    changes, again = measured(model, batches, file)
    assert torch.equal(changes, whole)
    assert runs == columns + 2 * 2
    assert again == left + (done > 0)  # and the first loss, which tells another loss apart
    assert columns_measured(file) == columns
    changes, again = measured(model, batches, file)
    assert torch.equal(changes, whole)
    assert again == 1
    assert os.listdir(tmp_path) == [file.name]


def test_what_was_written_within_a_minibatch_outlives_a_kill(tmp_path, monkeypatch):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    whole, _ = measured(model, batches, None)
    monkeypatch.setattr(measurements.Measurements, "__exit__", lambda *_: None)  # nothing is tidied up
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(30))
    assert columns_measured(file) == 0
    monkeypatch.setattr(measurements, "PAUSE", -1.0)
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(30))
    assert columns_measured(file) == 1 + TOGETHER * ((30 - 1 - CHECKS) // TOGETHER)
    assert torch.equal(measured(model, batches, file)[0], whole)


def test_the_same_random_numbers_are_drawn_after_an_interruption(tmp_path):
    model = nn.Sequential(residual(), nn.Dropout(0.5)).double().train()
    batches, file = [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    whole, _ = measured(model, batches, None)
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(40))
    torch.manual_seed(99)
    assert torch.equal(measured(model, batches, file)[0], whole)
    assert whole.isfinite().all()


def test_more_or_fewer_minibatches_than_the_file_holds(tmp_path):
    model, batches, file = made(residual), [batch(seed) for seed in range(3)], tmp_path / "oracle.safetensors"
    whole, _ = measured(model, batches, None)
    assert torch.equal(measured(model, batches[:2], file)[0], whole[:2])
    before = file.read_bytes()
    assert torch.equal(measured(model, batches[:1], file)[0], whole[:1])
    assert file.read_bytes() == before
    assert torch.equal(measured(model, batches, file)[0], whole)
    generator = (pair for pair in batches)
    assert torch.equal(tk.oracle(model, batches[0][0], F.cross_entropy, generator, together=7, file=file), whole)


def test_a_loss_that_is_nan_is_measured_all_the_same(tmp_path):
    model, batches, file = made(residual), [batch(1)], tmp_path / "oracle.safetensors"
    calls = []

    def loss(output, target):
        calls.append(1)
        return F.cross_entropy(output, target) * (torch.nan if len(calls) == 4 else 1)

    first, _ = measured(model, batches, file, loss, together=1)
    assert first.isnan().nonzero().tolist() == [[0, 2]]
    second, runs = measured(model, batches, file, together=1)
    assert torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    assert runs == 1


def test_files_of_something_else_are_refused_and_left_alone(tmp_path):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(70))
    before = file.read_bytes()
    other = copy.deepcopy(model)
    other[1].running_mean[0] += 1e-9
    x, target = batches[1]
    changed = target.clone()
    changed[3] = 4 - changed[3]
    refused = [
        (made(plain), batches, {}, "another model"),
        (other, batches, {}, "other parameters or buffers"),
        (copy.deepcopy(model).train(), batches, {}, "another mode"),
        (model, batches, {"units": [1, 2]}, "other units (36 of them; this call asks for 2)"),
        (model, batches[::-1], {}, "minibatch 0 had other inputs or targets"),
        (model, [batches[0], (x, changed)], {}, "minibatch 1 had other inputs or targets"),
        (model, [batches[0], (x + 1e-12, target)], {}, "minibatch 1 had other inputs or targets"),
        (model, batches, {"loss": lambda f, t: F.multi_margin_loss(f, t)}, "another loss"),
        (model, batches, {"loss": lambda f, t: F.cross_entropy(f, t) * (1 + 1e-4)}, "another loss"),
    ]
    for wrong, pairs, options, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)) as told:
            measured(wrong, pairs, file, **options)
        assert str(file) in str(told.value)
        assert "name another file" in str(told.value)
        assert file.read_bytes() == before, message
    assert torch.equal(measured(model, batches, file)[0], measured(model, batches, None)[0])


def test_damaged_files_are_refused_and_left_alone(tmp_path):
    model, batches, good = made(residual), [batch(1)], tmp_path / "good.safetensors"
    measured(model, batches, good)
    content = good.read_bytes()
    size = int.from_bytes(content[:8], "little")
    losses, _ = json.loads(content[8 : 8 + size])["losses"]["data_offsets"]
    flipped, altered = bytearray(content), bytearray(content)
    flipped[8 + size + losses + 30] ^= 1
    altered[content.index(b"minibatches") + 20] ^= 1
    damaged = {
        "is damaged": [content[:-5], b"", b"not a safetensors file", bytes(flipped), bytes(altered)],
        "not an oracle's": [safetensors.torch.save({"losses": torch.zeros(1, 4)})],
    }
    file = tmp_path / "bad.safetensors"
    for message, contents in damaged.items():
        for bad in contents:
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=message):
                measured(model, batches, file)
            assert file.read_bytes() == bad


def test_a_file_that_can_not_be_written_fails_before_the_work(tmp_path):
    def never(output, target):
        raise AssertionError("measured before the file was tried")

    with pytest.raises(OSError):
        measured(made(residual), [batch(1)], tmp_path / "missing" / "oracle.safetensors", never)
    with pytest.raises(OSError):
        measured(made(residual), [batch(1)], tmp_path, never)


def test_a_writing_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model, batches, file = made(residual), [batch(1)], tmp_path / "oracle.safetensors"
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(20))
    before = file.read_bytes()

    def full(*_):
        raise OSError("no room left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no room"):
        measured(model, batches, file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    measured(made(residual), [batch(1)], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert columns_measured(tmp_path / "target")


@pytest.mark.parametrize("units", [[-1], [0, 10_000], [0.5], [True, False], [[1]]])
def test_units_that_are_no_indices_are_refused(units):
    x, target = batch(1)
    with pytest.raises(ValueError, match="units must be a list of indices"):
        tk.oracle(made(residual), x, F.cross_entropy, [(x, target)], units=units)


def test_units_may_be_none_at_all_or_a_tensor():
    model, (x, target) = made(residual), batch(1)
    assert tk.oracle(model, x, F.cross_entropy, [(x, target)], units=[]).shape == (1, 0)
    assert tk.oracle(model, x, F.cross_entropy, [], units=torch.tensor([3, 1])).shape == (0, 2)
    with pytest.raises(ValueError, match="together=0"):
        tk.oracle(model, x, F.cross_entropy, [(x, target)], together=0)


def test_a_loss_of_many_numbers_is_refused_and_a_plain_number_is_not():
    model, (x, target) = made(residual), batch(1)
    with pytest.raises(ValueError, match="mean over the samples"):
        tk.oracle(model, x, lambda f, t: F.cross_entropy(f, t, reduction="none"), [(x, target)])
    plain_number = tk.oracle(model, x, lambda f, t: float(F.cross_entropy(f, t)), [(x, target)])
    assert torch.equal(plain_number, tk.oracle(model, x, F.cross_entropy, [(x, target)]))


class Scaled(nn.Module):
    """Takes a scalar and a vector of C beside its images, and writes into them."""

    def __init__(self):
        super().__init__()
        self.net = residual()

    def forward(self, factor, x, shift):
        x *= factor
        shift *= 2
        return self.net(x + shift[:, None, None])


def test_scalars_and_vectors_beside_the_batch_are_not_repeated_nor_are_inputs_written_to():
    torch.manual_seed(0)
    model = Scaled().double().eval()
    x, target = batch(1)
    inputs = (torch.tensor(0.5, dtype=torch.float64), x, torch.tensor([0.1, 0.2], dtype=torch.float64))
    before = copy.deepcopy(inputs)
    alone = tk.oracle(model, inputs, F.cross_entropy, [(inputs, target)], together=1)
    assert distance(tk.oracle(model, inputs, F.cross_entropy, [(inputs, target)]), alone) < 1e-9
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    with pytest.raises(ValueError, match="no tensor"):
        tk.oracle(made(residual), x, F.cross_entropy, [(0.5, target)])


def test_samples_that_meet_in_batch_statistics_are_measured_one_unit_at_a_time():
    torch.manual_seed(0)
    model = residual().double().eval()
    for i, module in enumerate(model):
        if isinstance(module, nn.BatchNorm2d):
            model[i] = nn.BatchNorm2d(module.num_features, track_running_stats=False).double().eval()
    x, target = batch(1)
    alone = tk.oracle(model, x, F.cross_entropy, [(x, target)], together=1)
    assert torch.equal(tk.oracle(model, x, F.cross_entropy, [(x, target)], together=16), alone)
    half = made(residual)
    half[3].bn1.train()  # evaluation but for one layer
    alone = tk.oracle(half, x, F.cross_entropy, [(x, target)], together=1)
    assert torch.equal(tk.oracle(half, x, F.cross_entropy, [(x, target)], together=16), alone)


class Centred(nn.Module):
    """Takes the batch's mean off, as no module tells."""

    def __init__(self):
        super().__init__()
        self.net = residual()

    def forward(self, x):
        logits = self.net(x)
        return 5 * (logits - logits.mean(0))


class Placed(nn.Module):
    """Adds a code to each sample's place in the batch: no larger batch fits."""

    def __init__(self):
        super().__init__()
        self.net, self.code = residual(), nn.Parameter(torch.ones(SAMPLES, 5))

    def forward(self, x):
        return self.net(x) + self.code[: max(1, len(x))]


def test_models_that_can_not_take_several_copies_are_told_so():
    x, target = batch(1)
    for build, message in ((Centred, "act on one another"), (Placed, "smaller together=, at last 1")):
        model = made(build)
        with pytest.raises(ValueError, match=message):
            tk.oracle(model, x, F.cross_entropy, [(x, target)])
        assert tk.oracle(model, x, F.cross_entropy, [(x, target)], together=1).isfinite().all()


class Standardised(nn.Module):
    """Normalises ``share`` of its output by the batch, as no module tells."""

    def __init__(self, share):
        super().__init__()
        self.net, self.share = plain(), share

    def forward(self, x):
        y = self.net(x)
        return torch.lerp(y, 8 * (y - y.mean(0)) / (y.std(0) + 1e-3), self.share)


def fitted(model, batches, loss):
    """``model`` trained until the loss of every minibatch is below ``loss``, in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(1000):
        losses = [F.cross_entropy(model(x), target) for x, target in batches]
        if max(losses) < loss:
            return model.eval()
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    raise AssertionError("not fitted")


@pytest.mark.parametrize("share", [1.0, 3e-4])
def test_samples_that_meet_are_noticed_where_the_loss_is_small_too(share):
    torch.manual_seed(0)
    x, target = normal((20, 2, 8, 8), 1), torch.arange(20) % 5
    model = fitted(Standardised(share), [(x, target)], 3e-4)
    with pytest.raises(ValueError, match=r"the whole network's loss .* act on one another"):
        tk.oracle(model, x, F.cross_entropy, [(x, target)])
    minibatch = Minibatch(model, tk.couple(model, x), x, target, F.cross_entropy, seed=0)
    units, whole = torch.arange(16), minibatch.losses(torch.tensor([WHOLE]))[0]
    with torch.no_grad(), pytest.raises(ValueError, match=r"the loss without unit .* act on one another"):
        minibatch.check_alone(units, minibatch.losses(units), whole)


class CentredNowAndThen(Centred):
    def forward(self, x):
        return super().forward(x) if x[0, 0, 0, 0] > 0 else self.net(x)


def test_every_minibatch_is_checked():
    model, batches = made(CentredNowAndThen), [batch(1), batch(2)]
    batches[0][0][0, 0, 0, 0], batches[1][0][0, 0, 0, 0] = -1, 1
    assert tk.oracle(model, batches[0][0], F.cross_entropy, batches[:1]).isfinite().all()
    with pytest.raises(ValueError, match="act on one another"):
        tk.oracle(model, batches[0][0], F.cross_entropy, batches)


def test_units_that_change_nothing_do_not_pass_for_a_check():
    model, (x, target) = made(Centred), batch(1)
    with torch.no_grad():  # the inner units of the first block
        model.net[3].bn1.weight.zero_()
        model.net[3].bn1.bias.zero_()
    coupling = tk.couple(model, x)
    dead = [u for u, unit in enumerate(coupling.units) if unit.places[0][0] == "net.3.bn1"]
    others = [u for u in range(len(coupling.units)) if u not in dead]
    assert tk.oracle(model, x, F.cross_entropy, [(x, target)], units=dead, together=3).abs().max() < 1e-12
    with pytest.raises(ValueError, match="act on one another"):
        tk.oracle(model, x, F.cross_entropy, [(x, target)], units=dead + others, together=3)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = residual()

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


def test_a_model_that_draws_random_numbers_in_evaluation_is_measured_one_unit_at_a_time():
    model, (x, target) = made(Noisy), batch(1)
    with pytest.raises(ValueError, match=r"draws random numbers.*pass together=1"):
        tk.oracle(model, x, F.cross_entropy, [(x, target)])
    assert tk.oracle(model, x, F.cross_entropy, [(x, target)], together=1).isfinite().all()


LOSSES = [F.cross_entropy, lambda f, t: f.mean(), lambda f, t: 1e4 * (f - F.one_hot(t, f.shape[1])).square().mean()]


@pytest.mark.parametrize("build", [residual, plain, *study.NETWORKS.values()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_samples_that_meet(build, dtype):
    torch.manual_seed(0)
    fresh = build()
    channels = next(fresh.parameters()).shape[1]
    batches = [(normal((10, channels, 8, 8), seed), torch.arange(10) % 5) for seed in range(2)]
    trained = fitted(copy.deepcopy(fresh).eval(), batches, 1e-3)
    units = range(0, len(tk.couple(fresh, batches[0][0]).units), 4)
    for model in (fresh.eval().to(dtype), trained.to(dtype)):
        inputs = [(x.to(dtype), target) for x, target in batches]
        for loss in LOSSES:
            together = tk.oracle(model, inputs[0][0], loss, inputs, units=units)
            if dtype == torch.float32:
                alone = tk.oracle(model, inputs[0][0], loss, inputs, units=units, together=1)
                assert distance(together, alone) < 1e-3


def test_rounding_in_a_deep_network_is_not_taken_for_samples_that_meet():
    torch.manual_seed(0)
    model, x = torchvision().models.resnet18().eval(), normal((2, 3, 64, 64), 1)
    for loss in LOSSES:
        assert tk.oracle(model, x, loss, [(x, torch.arange(2))], units=range(0, 2000, 60)).isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert tk.oracle(model, x, loss, [(x, torch.arange(2))], units=range(0, 2000, 400)).isfinite().all()


def test_the_precision_is_the_coarsest_that_the_model_computes_in():
    model = residual()
    assert _precision(model) == torch.finfo(torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert _precision(model) == torch.finfo(torch.bfloat16).eps
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert _precision(model) == torch.finfo(torch.bfloat16).eps
        assert _precision(copy.deepcopy(model).double()) == torch.finfo(torch.float64).eps
    finally:
        torch.set_float32_matmul_precision(before)
    assert _precision(model) == torch.finfo(torch.float32).eps
    model[0].half()
    assert _precision(model) == torch.finfo(torch.float16).eps


class Frames(nn.Module):
    """Clips [N, T, 2, 8, 8]: each frame by itself, then their mean."""

    def __init__(self):
        super().__init__()
        self.net = residual()

    def forward(self, x):
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


class Prompted(nn.Module):
    """Scales what it reads by a linear layer of a parameter [1, C], or of one [C]."""

    def __init__(self, *shape):
        super().__init__()
        self.read, self.prompt = nn.Linear(8, 6), nn.Parameter(torch.randn(*shape, 4))
        self.scale, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.relu(self.read(x[:, 0, 0]) + self.scale(self.prompt)))


@pytest.mark.parametrize("build", [Frames, lambda: Prompted(1), Prompted])
def test_layers_without_the_batch_in_front_are_measured_one_unit_at_a_time(build):
    model, (x, target) = made(build), batch(1)
    x = torch.stack([x, x.flip(0), 2 * x], 1) if isinstance(model, Frames) else x
    coupling = tk.couple(model, x)
    assert isinstance(model, Frames) or any(place[0] == "scale" for unit in coupling.units for place in unit.places)
    changes = tk.oracle(model, x, F.cross_entropy, [(x, target)], together=1)[0]
    whole, dim = F.cross_entropy(model(x), target), 1 if isinstance(model, Frames) else -1
    for u in range(0, len(coupling.units), 3):
        hooks = [
            model.get_submodule(layer).register_forward_hook(closing(channel, dim))
            for layer, channel in coupling.units[u].places
        ]
        assert distance(changes[u], F.cross_entropy(model(x), target) - whole) < 1e-9
        for hook in hooks:
            hook.remove()
    with pytest.raises(ValueError, match="pass together=1"):
        tk.oracle(model, x, F.cross_entropy, [(x, target)], together=4)


def closing(channel, dim):
    return lambda module, inputs, output: output.index_fill(dim, torch.tensor([channel]), 0)


def test_one_bar_counts_all_minibatches_and_goes_on_too(tmp_path, capsys):
    model, batches, file = made(residual), [batch(1), batch(2)], tmp_path / "oracle.safetensors"
    units = len(tk.couple(model, batches[0][0]).units)
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(2 * units), progress=True)
    capsys.readouterr()
    measured(model, batches, file, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    counts = [int(n) for n in re.findall(rf"(\d+)/{2 * units} ", err)]
    assert counts[0] >= units
    assert counts[-1] == 2 * units
    assert err.count("\n") == 1
    measured(model, batches, None)
    assert capsys.readouterr() == ("", "")


def test_a_copied_file_goes_on_elsewhere(tmp_path):
    model, batches, file = made(residual), [batch(1)], tmp_path / "oracle.safetensors"
    with pytest.raises(StoppedError):
        measured(model, batches, file, stopping_after(30))
    shutil.copy(file, tmp_path / "copy.safetensors")
    assert torch.equal(measured(model, batches, tmp_path / "copy.safetensors")[0], measured(model, batches, None)[0])


def test_the_whole_network_is_no_unit():
    model, (x, target) = made(residual), batch(1)
    found = Minibatch(model, tk.couple(model, x), x, target, F.cross_entropy, seed=0).losses(torch.tensor([WHOLE]))
    assert torch.equal(found, F.cross_entropy(model(x), target).detach().reshape(1))


class Wrapped:
    def __init__(self, classes):
        self.classes = classes


class Slotted:
    __slots__ = ("classes",)

    def __init__(self, classes):
        self.classes = classes


@dataclass(slots=True)
class Labelled:
    classes: torch.Tensor


def loss_of(output, target):
    return F.cross_entropy(output, getattr(target, "classes", None))


@pytest.mark.parametrize("kind", [Wrapped, Slotted, Labelled, lambda classes: SimpleNamespace(classes=classes)])
def test_targets_in_objects_are_told_apart(tmp_path, kind):
    model, (x, target), file = made(residual), batch(1), tmp_path / "oracle.safetensors"
    whole, _ = measured(model, [(x, kind(target))], file, loss_of)
    assert torch.equal(measured(model, [(x, kind(target.clone()))], file, loss_of)[0], whole)
    with pytest.raises(ValueError, match="minibatch 0 had other inputs or targets"):
        measured(model, [(x, kind(4 - target))], file, loss_of)


def test_targets_that_can_not_be_hashed_are_refused_by_name(tmp_path):
    model, (x, target), file = made(residual), batch(1), tmp_path / "oracle.safetensors"
    itself = []
    itself.append(itself)
    hidden = SimpleNamespace(classes=target, read=lambda: target)
    unhashable = {
        "builtins.generator": (n for n in range(3)),
        "builtins.function": hidden,
        "torch.Tensor": torch.eye(2).to_sparse(),
        "holds itself": itself,
    }
    for name, extra in unhashable.items():
        pair = (x, SimpleNamespace(classes=target, extra=extra))
        with pytest.raises(ValueError, match=f"{name}.*call without file="):
            measured(model, [pair], file, loss_of)
        assert measured(model, [pair], None, loss_of)[0].isfinite().all()


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(2, 2)),
        ([torch.zeros(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)]),
        ({"a": 1}, {"b": 1}),
        ([[1], 2], [[1, 2]]),
        ((torch.zeros(1), 1.0), (torch.zeros(1), 2.0)),
        (torch.arange(3).numpy(), torch.arange(1, 4).numpy()),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array([None, 1]), np.array([None, 2])),
        (np.ma.array([1, 2], mask=[0, 0]), np.ma.array([1, 2], mask=[0, 1])),
        (np.float32(1), np.float32(2)),
        (Wrapped([torch.zeros(2)]), Wrapped([torch.ones(2)])),
        (Wrapped(Wrapped(1)), Wrapped(Wrapped(2))),
        (Slotted(torch.zeros(2)), Slotted(torch.ones(2))),
        (SimpleNamespace(a=1), SimpleNamespace(b=1)),
        (Path("a"), Path("b")),
        ({1, 2}, {1, 3}),
        (torch.float32, torch.float64),
        (Wrapped, Slotted),
        (F.relu, F.gelu),
        (torch.zeros(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj()),
    ],
)
def test_digests_tell_contents_apart(one, other):
    assert measurements.digest(one) == measurements.digest(copy.deepcopy(one))
    assert measurements.digest(one) != measurements.digest(other)


def test_a_sets_order_does_not_count():
    """Two that collide in a set's table stand in it in the order they came in."""
    assert list({8, 0}) != list({0, 8})
    assert measurements.digest({8, 0}) == measurements.digest({0, 8})


def test_the_documentations_examples():
    for module in (tk.oracle.__globals__["__name__"], "taylorkern.measurements"):
        found = doctest.testmod(__import__(module, fromlist=["x"]))
        assert found.attempted and not found.failed
