"""The oracle: its ΔL is the cut network's loss less the dense one's, and what the expansions tend to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from taylorkern.oracle import WHOLE, Minibatch
from taylorkern.surgery import cut
from tests.cases import distance
from tests.networks import plain, residual
from tests.oracles import batch, made
from tests.test_scores import Argmax


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


def test_the_whole_network_is_no_unit():
    model, (x, target) = made(residual), batch(1)
    found = Minibatch(model, tk.couple(model, x), x, target, F.cross_entropy, seed=0).losses(torch.tensor([WHOLE]))
    assert torch.equal(found, F.cross_entropy(model(x), target).detach().reshape(1))
