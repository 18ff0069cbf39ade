"""torch.nn.SyncBatchNorm: scored as autograd has it, coupled, cut, saved and loaded."""

import copy

import pytest
import torch
from torch import nn

import taylorkern as tk
from tests.cases import distance
from tests.networks import gate_gradients, residual

X = torch.randn(6, 2, 8, 8, dtype=torch.float64)
TARGET = torch.arange(6) % 5


def out_of_place(model):
    """Without operations that overwrite a normalisation's output, which a hook's score would miss."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def synchronised(convert_first):
    torch.manual_seed(0)
    model = out_of_place(residual().double())
    if convert_first:
        return tk.convert(nn.SyncBatchNorm.convert_sync_batchnorm(tk.convert(model)), fuse=True)
    return tk.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model))


class Added(nn.Module):
    """A block that adds out of place."""

    def __init__(self, width=5):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.SyncBatchNorm(width)
        self.inner, self.behind = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.SyncBatchNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = (x + self.behind(self.inner(x))).relu()
        return self.head(x.mean((2, 3)))


def network():
    torch.manual_seed(0)
    model = Added().double()
    for norm in (model.norm, model.behind):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return tk.convert(model)


@pytest.mark.parametrize("training", [False, True])
def test_gates_have_autograds_gradients(training):
    model = network().train(training)
    twin = copy.deepcopy(model)
    scores = tk.Scores(model, X[:1])
    nn.functional.cross_entropy(model(X), TARGET).backward()
    s = gate_gradients(twin, scores.units, X, TARGET)
    assert {layer for unit in scores.units for layer, _ in unit.places} == {"norm", "behind"}
    assert distance(scores.importance("taylor_fo"), s.sum(0).square()) < 1e-9
    assert distance(scores.importance("bn_taylor"), s.sum(0).square()) < 1e-9
    assert distance(scores.importance("bn_scale"), bn_scale(model, scores.units)) < 1e-12


def bn_scale(model, units):
    norms = dict(model.named_modules())
    return torch.stack([sum(norms[layer].weight[c].abs() for layer, c in unit.places) for unit in units]).detach()


def test_units_are_those_of_ordinary_batch_normalisation():
    ordinary = tk.couple(tk.convert(residual().double()), X[:1])
    for convert_first in (False, True):
        coupling = tk.couple(synchronised(convert_first), X[:1])
        assert [unit.places for unit in coupling.units] == [unit.places for unit in ordinary.units]


def test_it_is_cut_saved_and_loaded(tmp_path):
    model = network().eval()
    scores = tk.Scores(model, X[:1])
    nn.functional.cross_entropy(model(X), TARGET).backward()
    removed = tk.prune(model, X[:1], scores.importance("taylor_fo"), target=0.6, of="channels")
    assert len(removed) == 2 and model.norm.num_features == 3 and model.norm.running_mean.shape == (3,)
    tk.save(model, tmp_path / "cut.safetensors")
    again = tk.load(tmp_path / "cut.safetensors", Added().double()).eval()
    assert type(again.norm) is nn.SyncBatchNorm and again.norm.num_features == 3
    assert torch.equal(again(X), model(X))


def test_an_output_that_is_overwritten_in_place_scores_as_one_that_is_not():
    found = []
    for change in (lambda model: model, out_of_place):
        torch.manual_seed(0)
        model = tk.convert(nn.SyncBatchNorm.convert_sync_batchnorm(change(residual().double())))
        scores = tk.Scores(model, X[:1])
        nn.functional.cross_entropy(model(X), TARGET).backward()
        found.append(scores.importance("taylor_fo"))
    assert torch.equal(*found) and found[0].min() > 0
