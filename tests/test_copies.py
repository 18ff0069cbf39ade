"""Copies of a model go through its cuts and masks: which they are, wrapped or not, and which are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import taylorkern as tk
from taylorkern.compensation import folded
from taylorkern.copies import counterparts
from taylorkern.masking import mask
from taylorkern.surgery import cut
from tests.failures import fail_at_edit
from tests.networks import residual
from tests.test_surgery import same, snapshot

IMAGE = torch.randn(2, 2, 8, 8)


def averaged(**options):
    torch.manual_seed(0)
    model = residual()
    average = AveragedModel(model, **options)
    with torch.no_grad():
        for p in average.module.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, average


WRAPPED = {
    "none": lambda model: copy.deepcopy(model),
    "average": lambda model: AveragedModel(model),
    "average of an average": lambda model: AveragedModel(AveragedModel(model)),
    "compiled": lambda model: torch.compile(copy.deepcopy(model), backend="eager"),
    "average of compiled": lambda model: AveragedModel(torch.compile(model, backend="eager")),
    "parallel": lambda model: nn.DataParallel(copy.deepcopy(model)),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_are_looked_through(wrapped):
    model = residual()
    outer = WRAPPED[wrapped](model)
    coupling = tk.couple(model, IMAGE)
    expected = [tuple(p.shape) for p in model.parameters()]
    [inner] = counterparts(model, outer)
    assert [name for name, _ in inner.named_parameters()] == [name for name, _ in model.named_parameters()]
    cut(model, coupling, [0, 8, 30], IMAGE, copies=outer)
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes != expected and shapes == [tuple(p.shape) for p in inner.parameters()]
    assert [repr(m) for m in inner.modules()] == [repr(m) for m in model.modules()]
    assert torch.equal(inner.eval()(IMAGE), model.eval()(IMAGE))


def test_a_copy_keeps_its_own_numbers_dtype_and_count():
    model, average = averaged(avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    average.module.double()
    average.n_averaged.fill_(7)
    coupling = tk.couple(model, IMAGE)
    before = {name: t.clone() for name, t in average.module.state_dict().items()}
    cut(model, coupling, [1, 9], IMAGE, copies=(average,))
    stays = coupling.staying(torch.tensor([1, 9]))
    for name, tensor in average.module.state_dict().items():
        for dim in range(tensor.dim()):
            if (name, dim) in coupling.axes:
                before[name] = before[name].index_select(dim, stays[coupling.axes[name, dim]].nonzero().flatten())
        assert torch.equal(tensor, before[name])
    assert int(average.n_averaged) == 7
    average.update_parameters(model)


@pytest.mark.parametrize("how", [cut, mask])
def test_gates_are_folded_into_the_weights_of_each(how):
    model, average = averaged()
    model, average = model.double(), average.double()
    coupling = tk.couple(model, IMAGE.double())
    removed, z = torch.tensor([0, 9]), torch.linspace(0.5, 1.5, len(coupling.units), dtype=torch.float64)
    expected = folded(average.module, coupling, removed, z)
    how(model, coupling, removed, IMAGE.double(), gates=z, copies=average)
    stays = coupling.staying(removed)
    names = dict(average.module.named_parameters())
    assert expected
    for name, values in expected.items():
        tensor = names[name]
        for dim in range(values.dim()):
            units = coupling.axes.get((name, dim))
            if units is not None:
                rows = stays[units].nonzero().flatten()
                values = values.index_select(dim, rows)
                tensor = tensor.index_select(dim, rows) if tensor.shape[dim] == len(units) else tensor
        assert torch.equal(tensor, values)


def lacking(model):
    other = copy.deepcopy(model)
    del other[3].conv1
    return other, r"copies\[0\] \(Sequential\) is no copy of the model: it has no 3\.conv1\.weight"


def thinner(model):
    other = copy.deepcopy(model)
    cut(other, tk.couple(other, IMAGE), [8], IMAGE)
    return AveragedModel(
        other
    ), r"copies\[0\] \(AveragedModel\).*its 3\.conv1\.weight is \(5, 6, 3, 3\), the model's \(6, 6"


def tied(model):
    other = copy.deepcopy(model)
    other[3].conv2.weight = other[3].conv1.weight
    return other, r"3\.conv1\.weight and 3\.conv2\.weight are one tensor in one of them only"


def nothing(model):
    return {"0.weight": model[0].weight}.items(), r"copies\[0\] is a tuple; a copy is a module"


@pytest.mark.parametrize("how", [cut, mask])
@pytest.mark.parametrize("case", [lacking, thinner, tied, nothing])
def test_what_is_no_copy_is_refused_by_name_before_anything_changes(case, how):
    torch.manual_seed(0)
    model = tk.convert(residual())
    other, message = case(model)
    coupling = tk.couple(model, IMAGE)
    importance, before = torch.rand(len(coupling.units)), snapshot(model)
    with pytest.raises(ValueError, match=message):
        how(model, coupling, [0], IMAGE, copies=other if isinstance(other, nn.Module) else list(other))
    assert same(before, snapshot(model))
    with pytest.raises(ValueError, match=message):
        tk.Pruner(model, IMAGE, copies=other)
    with pytest.raises(ValueError, match=message):
        tk.prune(model, IMAGE, importance, copies=other)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("how", [cut, mask])
@pytest.mark.parametrize("failing", [1, 9, 20, 27, 30])
def test_a_failure_on_the_way_rolls_copies_back_too(failing, how, monkeypatch):
    model, average = averaged()
    model(IMAGE).sum().backward()
    coupling, before = tk.couple(model, IMAGE), (snapshot(model), snapshot(average))
    with monkeypatch.context() as patch:
        fail_at_edit(patch, failing if how is cut else 1 + failing // 3)
        with pytest.raises(MemoryError, match="injected"):
            how(model, coupling, [0, 8], IMAGE, copies=average)
    assert same(before[0], snapshot(model)) and same(before[1], snapshot(average))
