"""What is refused, or warns where warnings are errors, leaves the Scores that was attached before alone."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from tests.networks import residual

IMAGES, LABELS = torch.randn(4, 2, 8, 8), torch.arange(4) % 3


def scored(**options):
    torch.manual_seed(0)
    model = tk.convert(residual())
    scores = tk.Scores(model, IMAGES, **options)
    step(model)
    return model, scores


def step(model):
    F.cross_entropy(model(IMAGES), LABELS).backward()


def goes_on(model, scores):
    before = scores.minibatches
    step(model)
    return scores.minibatches == before + 1


FAILING = {
    "unreachable": lambda model: tk.Pruner(model, IMAGES, target=0.001),
    "unreachable by the surgeon": lambda model: tk.Pruner(model, IMAGES, target=0.001, criterion="surgeon"),
    "too small a budget": lambda model: tk.Scores(model, IMAGES, gram="full", gram_budget=8),
    "a Pruner's": lambda model: tk.Pruner(model, IMAGES, criterion="surgeon", gram="full", gram_budget=8),
    "another's coupling": lambda model: tk.Scores(model, IMAGES, coupling=tk.couple(residual(5), IMAGES)),
    "unknown form": lambda model: tk.Pruner(model, IMAGES, criterion="surgeon", gram="triangle"),
}


@pytest.mark.parametrize("failing", FAILING)
def test_what_is_refused_takes_no_gate_over(failing):
    model, scores = scored(criteria=["taylor_weight", "taylor_output"])
    hooks = len(model[0].weight._backward_hooks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"can.t be reached|gram=|of another model"):
            FAILING[failing](model)
    assert goes_on(model, scores) and len(model[0].weight._backward_hooks) == hooks
    assert scores.importance("taylor_weight").isfinite().all()


class Detached(nn.Module):
    """What it returns depends on no gate, once ``frozen`` is set."""

    def __init__(self):
        super().__init__()
        self.body, self.frozen = residual(), False

    def forward(self, x):
        return self.body(x).detach() if self.frozen else self.body(x)


def test_an_example_without_gradients_takes_no_gate_over():
    model = tk.convert(Detached())
    scores = tk.Scores(model, IMAGES)
    model.frozen = True
    with pytest.raises(ValueError, match="nothing that can be differentiated"):
        tk.Scores(model, IMAGES, criteria=["taylor_weight"])
    model.frozen = False
    assert goes_on(model, scores)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_a_warning_that_is_an_error_takes_no_gate_over():
    model, scores = scored()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="already feeds another Scores"):
            tk.Scores(model, IMAGES)
    assert goes_on(model, scores)


def test_a_warning_that_is_an_error_comes_before_the_cut():
    torch.manual_seed(0)
    model = tk.convert(residual())
    scores = tk.Scores(model, None, layers=["1"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = len(tk.couple(model, IMAGES).units)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="can't follow"):
            tk.prune(model, IMAGES, torch.rand(units), target=0.7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert goes_on(model, scores)
