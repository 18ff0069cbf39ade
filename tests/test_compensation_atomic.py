"""Gates folded in with a cut: all or nothing, whatever fails, and the optimiser goes on."""

import copy
import itertools

import pytest
import torch
from torch import nn

from taylorkern import surgery
from taylorkern.compensation import folded
from taylorkern.coupling import couple
from taylorkern.surgery import SurgeryError, cut
from tests.failures import fail_at_edit
from tests.networks import residual
from tests.test_surgery import OPTIMIZERS, same, snapshot, step

IMAGE = torch.randn(2, 2, 8, 8)


def trained(name: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = residual()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, IMAGE, torch.tensor([0, 1]))
    return model, optimizer


@pytest.mark.parametrize("removed", [[0, 8], []])
def test_a_failure_anywhere_in_the_swap_leaves_everything(removed, monkeypatch):
    model, optimizer = trained()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    z = torch.linspace(-1, 2, len(coupling.units))
    for failing in itertools.count(1):
        with monkeypatch.context() as patch:
            fail_at_edit(patch, failing)
            try:
                cut(model, coupling, removed, IMAGE, [optimizer], verify=failing < 3, gates=z)
            except MemoryError:
                assert same(before, snapshot(model, optimizer))
            else:
                break
    assert failing > (20 if removed else 10)


@pytest.mark.parametrize("where", ["rounded", "folded", "check", "sliced", "cut_moments"])
def test_a_failure_before_the_swap_leaves_everything(where, monkeypatch):
    model, optimizer = trained()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    calls, own = [], getattr(surgery, where)

    def failing(*arguments):
        calls.append(where)
        if len(calls) == (5 if where in ("rounded", "sliced") else 1):
            raise MemoryError("injected")
        return own(*arguments)

    monkeypatch.setattr(surgery, where, failing)
    with pytest.raises(MemoryError, match="injected"):
        cut(model, coupling, [0, 8], IMAGE, [optimizer], gates=torch.linspace(-1, 2, len(coupling.units)))
    assert same(before, snapshot(model, optimizer))


def test_a_wrong_folding_is_refused(monkeypatch):
    def without_bias(*arguments):
        return {name: t for name, t in folded(*arguments).items() if not name.endswith("bias")}

    monkeypatch.setattr(surgery, "folded", without_bias)
    model, optimizer = trained()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    for removed, lost in (([], "refused: with the gates"), ([0], "refused: without unit 0 .* and 0 more and with the")):
        with pytest.raises(SurgeryError, match=f"{lost}.*dense one with these gates at"):
            cut(model, coupling, removed, IMAGE, [optimizer], gates=torch.linspace(-1, 2, len(coupling.units)))
        assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("removed", [[0, 7], []])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimiser_goes_on(name, removed):
    """With the state of before, cut: the next step is the one of a thin model with these weights and this state."""
    model, optimizer = trained(name)
    coupling = couple(model, IMAGE)
    plainly, twin = copy.deepcopy((model, optimizer))
    z = torch.linspace(0.5, 1.5, len(coupling.units))
    parameters = list(model.parameters())
    cut(plainly, coupling, removed, IMAGE, [twin])
    cut(model, coupling, removed, IMAGE, [optimizer], gates=z)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for p, q in zip(model.parameters(), plainly.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[q][key]))
    plainly.load_state_dict(model.state_dict())
    for _ in range(2):
        a, b = (step(m, o, IMAGE, torch.tensor([0, 1])) for m, o in ((model, optimizer), (plainly, twin)))
        assert torch.equal(a, b)


def test_an_optimiser_whose_state_cannot_be_cut_does_not_stop_folding():
    model, optimizer = trained("sgd")
    optimizer.state[model[0].weight]["factor"] = torch.zeros(6)
    coupling = couple(model, IMAGE)
    z = torch.linspace(0.5, 1.5, len(coupling.units))
    cut(model, coupling, [], IMAGE, [optimizer], gates=z)
    with pytest.raises(SurgeryError, match="'factor'"):
        cut(model, coupling, [0], IMAGE, [optimizer], gates=z)
