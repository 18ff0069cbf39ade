"""Scoring, coupling, measuring and pruning a fused model: as the unfused one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import taylorkern as tk
from tests.cases import distance, normal
from tests.fused import caller as caller
from tests.fused import needs_kernels, state, step, trained
from tests.fused import ran as ran
from tests.networks import residual

pytestmark = [needs_kernels, pytest.mark.usefixtures("caller")]


def test_coupling_oracle_and_masks_see_the_plain_network(ran):
    (plain, x, _, _), (fused, _, _, _) = trained(False), trained(True)
    assert ran == {"act": 12, "add": 8}  # three steps, and the forward by which Scores looks at the layers
    couplings = [tk.couple(model, x) for model in (plain, fused)]
    assert couplings[0].units == couplings[1].units and couplings[0].layers.keys() == couplings[1].layers.keys()
    batches = [(x, torch.arange(4))]
    changes = [tk.oracle(model.eval(), x, F.cross_entropy, batches) for model in (plain, fused)]
    assert distance(changes[1], changes[0]) < 1e-9


def test_a_fused_model_is_pruned_and_goes_on_training(ran):
    results = []
    for fuse in (False, True):
        model, x, scores, _ = trained(fuse)
        tk.prune(model, x, scores.importance("taylor_fo"), target=0.7, of="channels")
        ran.clear()
        results.append((step(model, x), state(model)[0]))
    assert ran == {"act": 3, "add": 2}
    for want, got in zip(*results, strict=True):
        assert distance(got, want) < 1e-9


def test_the_pruner_works_on_a_fused_model(ran):
    model = tk.convert(residual().double(), fuse=True)
    x = normal((4, 2, 8, 8), 1, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = tk.Pruner(model, x, optimizer=optimizer, target=0.6, of="channels", every=1, step=2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        pruner.step()
        if pruner.done:
            break
    assert pruner.done and ran["add"] > 2
    assert isinstance(model(x), Tensor)


def test_scores_over_several_losses_and_batches_are_the_unfused_ones():
    results = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = tk.convert(residual().double(), fuse=fuse)
        x = normal((4, 2, 8, 8), 1, torch.float64)
        scores = tk.Scores(model, x)
        for round_ in range(2):
            out = model(x * (round_ + 1))
            out.sin().sum().backward(retain_graph=True)
            out.cos().sum().backward()
            model(x[:2]).sum().backward()
        logits = model(x)
        torch.manual_seed(0)
        scores.curvature(logits, torch.arange(4))
        F.cross_entropy(logits, torch.arange(4)).backward()
        results.append(torch.cat([scores.importance(name) for name in ("taylor_fg", "taylor_fo", "taylor_so")]))
    assert distance(results[1], results[0]) < 1e-9
