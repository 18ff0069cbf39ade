"""A network whose Scores keeps a Gram matrix, its minibatches, and what the matrix should be."""

import copy

import pytest
import torch
import torch.nn.functional as F

import taylorkern as tk
from taylorkern.gram import FORMS
from tests.cases import normal
from tests.networks import gate_gradients, residual

EACH_FORM = pytest.mark.parametrize("form", FORMS)


def batch(seed, n=7, dtype=torch.float64):
    return normal((n, 2, 8, 8), seed, dtype), (torch.arange(n) * (seed + 2)) % 5


def made(build=lambda: residual(3), form="full", dtype=torch.float64, **options):
    """In evaluation mode: samples don't act on one another, and the Gauss-Newton rows are exact."""
    torch.manual_seed(0)
    model = tk.convert(build().to(dtype)).eval()
    return model, tk.Scores(model, batch(0, dtype=dtype)[0], gram=form, **options)


def step(model, seed, n=7, scores=None, **curvature):
    x, target = batch(seed, n, next(model.parameters()).dtype)
    model.zero_grad()
    logits = model(x)
    if scores is not None:
        scores.curvature(logits, target, **curvature)
    F.cross_entropy(logits, target).backward()


def whole(scores, form=None):
    """[U, U], zeros between the blocks."""
    units = len(scores.units)
    matrix = torch.zeros(units, units, dtype=torch.float64)
    for block in scores.gram(form):
        assert torch.equal(block.matrix, block.matrix.T) and torch.equal(block.units, block.units.sort().values)
        matrix[block.units.unsqueeze(1), block.units] = block.matrix
    return matrix


def within_layers(scores, matrix):
    first = [unit.places[0][0] for unit in scores.units]
    return torch.tensor([[a == b for b in first] for a in first]) * matrix


def fisher(model, scores, seeds, n=7):
    wide = tk.revert(copy.deepcopy(model))
    rows = [gate_gradients(wide, scores.units, *batch(seed, n)) for seed in seeds]
    return torch.stack([n * s.T @ s for s in rows]).mean(0)
