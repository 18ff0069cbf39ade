"""Several units in one forward: only where each comes out as it would alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from bench.study import networks as study
from bench.zoo import torchvision
from taylorkern.oracle import WHOLE, Minibatch, _precision
from tests.cases import distance, normal
from tests.networks import plain, residual
from tests.oracles import SAMPLES, batch, made


def test_units_measured_together_or_one_by_one_are_the_same():
    model, batches = made(residual), [batch(1), batch(2)]
    one = tk.oracle(model, batches[0][0], F.cross_entropy, batches, together=1)
    for together in (4, 7, 1000):
        assert distance(tk.oracle(model, batches[0][0], F.cross_entropy, batches, together=together), one) < 1e-9
    some = tk.oracle(model, batches[0][0], F.cross_entropy, batches, units=[5, 2])
    assert distance(some, one[:, [5, 2]]) < 1e-9


def test_only_layers_that_hold_the_removed_units_are_multiplied():
    model = made(residual)
    x, target = batch(1)
    coupling, multiplied = tk.couple(model, x), set()
    model.register_forward_pre_hook(
        lambda *_: multiplied.update(name for name, module in model.named_modules() if module._forward_hooks)
    )
    for removed in ([WHOLE], [0], [0, 7], [len(coupling.units) - 1, WHOLE]):
        multiplied.clear()
        Minibatch(model, coupling, x, target, F.cross_entropy, seed=0).losses(torch.tensor(removed))
        units = [coupling.units[u] for u in removed if u != WHOLE]
        assert multiplied == {layer for unit in units for layer, _ in unit.places}


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


def closing(channel, dim):
    return lambda module, inputs, output: output.index_fill(dim, torch.tensor([channel]), 0)


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
