"""Conversion of real networks: state, evaluation, and the gradients of training while it is scored."""

import copy

import pytest
import torch
from torch import nn

import taylorkern as tk
from tests.cases import distance, normal

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

NETWORKS = ["resnet50", "mobilenet_v2", "densenet121", "vgg16_bn"]
X, TARGET = normal((4, 3, 64, 64), 1), torch.tensor([1, 5, 7, 0])


def build(name):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=10)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_fits_both_ways_and_evaluation_is_bit_identical(name):
    plain, other = build(name), build(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    ours = tk.convert(copy.deepcopy(plain))
    assert torch.equal(plain.eval()(X[:1]), ours.eval()(X[:1]))
    ours.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(other.eval()(X[:1]), ours(X[:1]))
    build(name).load_state_dict(ours.state_dict(), strict=True)


def gradient(model, x):
    """All gradients of one training step, end to end, in one vector; dropout's mask is the same each time."""
    torch.manual_seed(1)
    nn.functional.cross_entropy(model.train()(x), TARGET).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_scored_training_are_torchs(name):
    plain = build(name)
    wide = copy.deepcopy(plain).double()
    ours, ours_wide = tk.convert(copy.deepcopy(plain)), tk.convert(copy.deepcopy(wide))
    scores, scores_wide = tk.Scores(ours, X[:1]), tk.Scores(ours_wide, X[:1].double())
    exact = gradient(wide, X.double())
    assert distance(gradient(ours_wide, X.double()), exact) < 1e-9
    torchs = distance(gradient(plain, X), exact)
    assert distance(gradient(ours, X), exact) <= 2 * torchs
    assert scores.minibatches == scores_wide.minibatches == 1
    # In float32 the last bits, and with them the number of threads, decide which activations a ReLU lets through:
    # torch's own gradients of a deep network are off by percents, and a square by twice as much.
    error = distance(scores.importance("taylor_fo"), scores_wide.importance("taylor_fo"))
    assert error <= 4 * torchs
