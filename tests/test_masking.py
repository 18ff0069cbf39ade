"""Masks: what they hold at nought, through what, and what becomes of them."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import taylorkern as tk
from taylorkern.masking import mask
from taylorkern.masks import mask_of, masked_units
from taylorkern.surgery import SurgeryError, cut
from tests.failures import fail_at_edit
from tests.networks import plain, residual
from tests.test_coupling import Net, conv
from tests.test_surgery import quietly_wrong, same, snapshot

IMAGE = torch.randn(2, 2, 8, 8)


def made(build=residual):
    torch.manual_seed(0)
    model = build()
    return model, tk.couple(model, IMAGE)


def gone(model, coupling, removed):
    """The consumers' weights for the removed units, together."""
    named = dict(model.named_parameters())
    at = {
        axis: torch.isin(coupling.axes[axis], torch.tensor(removed)).nonzero().flatten() for axis in coupling.consumers
    }
    return torch.cat([named[name].detach().index_select(dim, rows).flatten() for (name, dim), rows in at.items()])


def train(model, optimizer, steps=2):
    for step in range(steps):
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()


def test_gradients_of_the_makers_are_nought_and_nothing_moves_but_values():
    model, coupling = made()
    before = [(p, p.data_ptr(), p.stride(), p.requires_grad) for p in model.parameters()]
    mask(model, coupling, [0, 8], IMAGE)
    F.cross_entropy(model(IMAGE), torch.arange(2)).backward()
    assert [(p, p.data_ptr(), p.stride(), p.requires_grad) for p in model.parameters()] == before
    for name, parameter in model.named_parameters():
        for dim in range(parameter.dim()):
            units = coupling.axes.get((name, dim), torch.zeros(0))
            assert not parameter.grad.index_select(
                dim, torch.isin(units, torch.tensor([0, 8])).nonzero().flatten()
            ).any()
        assert parameter.grad.any()


def test_what_has_been_accumulated_is_forgotten_there_too():
    model, coupling = made()
    F.cross_entropy(model(IMAGE), torch.arange(2)).backward()
    mask(model, coupling, [0, 8], IMAGE)
    F.cross_entropy(model(IMAGE), torch.arange(2)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not gone(model, coupling, [0, 8]).any()


def test_gradients_asked_for_by_name_are_masked_as_well():
    model, coupling = made()
    mask(model, coupling, [0], IMAGE)
    (grad,) = torch.autograd.grad(model(IMAGE).sum(), model[3].conv1.weight)
    assert not grad[:, 0].any() and grad[:, 1:].any()


def test_masks_add_up_and_a_cut_leaves_the_others():
    model, coupling = made()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for removed in ([0, 8], [3], [8, 20]):
        mask(model, coupling, removed, IMAGE, [optimizer])
    assert masked_units(model, coupling).tolist() == [0, 3, 8, 20]
    after = cut(model, coupling, [3, 5, 8], IMAGE, [optimizer])
    assert [after.dense[u] for u in masked_units(model, after)] == [0, 20]
    train(model, optimizer)
    assert not gone(model, after, [0, 17]).any() and gone(model, after, [1]).any()
    cut(model, after, [0, 17], IMAGE, [optimizer])
    assert mask_of(model) is None
    train(model, optimizer)
    assert all(p.any() for p in model.parameters())


def test_a_cut_by_other_units_is_refused_while_some_are_masked():
    model, coupling = made()
    mask(model, coupling, [0], IMAGE)
    other = coupling.keep(torch.arange(1, len(coupling.units)))
    with pytest.raises(ValueError, match="counted by another coupling"):
        cut(model, other, [0], IMAGE)


def test_what_is_loaded_is_held_again_from_the_next_hold_on():
    model, coupling = made()
    average, state = AveragedModel(model), copy.deepcopy(model.state_dict())
    held = mask(model, coupling, [0, 8], IMAGE, copies=average)
    model.load_state_dict(state)
    average.module.load_state_dict(state)
    assert gone(model, coupling, [0, 8]).any()
    held.hold(model, [average.module])
    assert not gone(model, coupling, [0, 8]).any() and not gone(average.module, coupling, [0, 8]).any()
    model.load_state_dict(state, assign=True)  # other Parameters
    held.hold(model)
    F.cross_entropy(model(IMAGE), torch.arange(2)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not gone(model, coupling, [0, 8]).any()


def test_frozen_weights_are_held_once_they_train():
    model, coupling = made()
    model[3].requires_grad_(False)
    held = mask(model, coupling, [0, 8], IMAGE)
    assert not gone(model, coupling, [0, 8]).any()
    model[3].requires_grad_(True)
    held.hold(model)
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert not gone(model, coupling, [0, 8]).any()


def test_moves_to_another_dtype_take_the_mask_along():
    model, coupling = made()
    mask(model, coupling, [0, 8], IMAGE)
    model.double().half().float()
    train(model.to(memory_format=torch.channels_last), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert not gone(model, coupling, [0, 8]).any()


def test_released_weights_train_on_from_nought():
    model, coupling = made()
    mask(model, coupling, [0, 8], IMAGE).release()
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert gone(model, coupling, [0, 8]).all()


def test_a_copy_of_a_masked_model_holds_nought_but_no_mask_and_nothing_lives_on():
    model, coupling = made()
    mask(model, coupling, [0, 8], IMAGE)
    twin, seen = copy.deepcopy(model), weakref.ref(model)
    assert mask_of(twin) is None and not gone(twin, coupling, [0, 8]).any()
    train(twin, torch.optim.SGD(twin.parameters(), 0.1))
    assert gone(twin, coupling, [0, 8]).any()
    del model
    gc.collect()
    assert seen() is None


def test_a_model_whose_own_weight_is_masked_is_forgotten_too():
    class Two(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.before = nn.Linear(2, 5)

        def forward(self, x):
            return super().forward(self.before(x.mean((2, 3))).relu())

    model = Two()
    seen, coupling = weakref.ref(model), tk.couple(model, IMAGE)
    assert coupling.consumers == {("weight", 1)}
    mask(model, coupling, [1], IMAGE)
    del model
    gc.collect()
    assert seen() is None


def test_a_weight_of_several_names_is_masked_once():
    net = Net(
        lambda net, x: net.head(net.b(net.a(net.stem(x)).relu()).relu()),
        stem=conv(2, 4),
        a=conv(4, 4),
        b=conv(4, 4),
        head=conv(4, 2),
    )
    net.b.weight = net.a.weight
    coupling = tk.couple(net, IMAGE)
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (net, twin)]
    mask(net, coupling, [1], IMAGE)
    cut(twin, coupling, [1], IMAGE)
    for model, optimizer in zip((net, twin), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            model(IMAGE).square().mean().backward()
            optimizer.step()
    assert not net.b.weight[:, 1].any()
    torch.testing.assert_close(net(IMAGE), twin(IMAGE))


def test_what_could_not_be_cut_is_not_masked():
    model = Net(quietly_wrong, conv=conv(2, 4), head=nn.Linear(4, 2))
    coupling, before = tk.couple(model, IMAGE), snapshot(model)
    with pytest.raises(SurgeryError, match="at head"):
        mask(model, coupling, [1], IMAGE)
    assert same(before, snapshot(model)) and mask_of(model) is None
    with pytest.raises(ValueError, match="nothing of"):
        mask(*made(plain), range(6), IMAGE)


@pytest.mark.parametrize("gated", [False, True])
def test_a_failure_on_the_way_leaves_everything(gated, monkeypatch):
    model, coupling = made()
    optimizer, average = torch.optim.AdamW(model.parameters(), 1e-2), AveragedModel(model)
    train(model, optimizer)
    z = torch.linspace(-1, 2, len(coupling.units)) if gated else None
    mask(model, coupling, [3], IMAGE, [optimizer], copies=average)
    before = snapshot(model, optimizer), snapshot(average)
    for failing in itertools.count(1):
        with monkeypatch.context() as patch:
            fail_at_edit(patch, failing)
            try:
                mask(model, coupling, [0, 8], IMAGE, [optimizer], failing < 3, z, average)
            except MemoryError:
                assert same(before[0], snapshot(model, optimizer)) and same(before[1], snapshot(average))
                assert masked_units(model, coupling).tolist() == [3]
            else:
                break
    assert failing > 20 and masked_units(model, coupling).tolist() == [0, 3, 8]


def test_a_tensor_replaced_by_one_of_another_shape_is_noticed():
    model, coupling = made()
    mask(model, coupling, [0], IMAGE)
    model[3].conv1.weight.data = model[3].conv1.weight.data[:, 1:]
    with pytest.raises(RuntimeError, match=r"3\.conv1\.weight was masked as \(6, 6, 3, 3\) and is \(6, 5, 3, 3\) now"):
        model[3].conv1(torch.randn(2, 5, 4, 4)).sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_goes_on_without_compiling_again(backend):
    model, coupling = made(plain)
    optimizer, twin = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    plainly = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    train(compiled, optimizer)
    train(twin, plainly)
    mask(model, coupling, [0, 8], IMAGE, [optimizer])
    mask(twin, coupling, [0, 8], IMAGE, [plainly])
    with torch.compiler.set_stance("fail_on_recompile"):
        train(compiled, optimizer, 3)
    train(twin, plainly, 3)
    assert not gone(model, coupling, [0, 8]).any()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_wrapped_for_several_processes_goes_on(alone):
    model, coupling = made()
    parallel, twin = DistributedDataParallel(model), copy.deepcopy(model)
    optimizer, plainly = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, twin))
    train(parallel, optimizer)
    train(twin, plainly)
    mask(model, coupling, [0, 8], IMAGE, [optimizer])
    mask(twin, coupling, [0, 8], IMAGE, [plainly])
    train(parallel, optimizer, 3)
    train(twin, plainly, 3)
    assert not gone(model, coupling, [0, 8]).any()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_torchs_attention_is_masked_and_stays_torchs():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 3, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model, x = Wrapped().double(), torch.randn(2, 4, 6, dtype=torch.float64)
    coupling = tk.couple(model, x)
    held = mask(model, coupling, [1], x)
    assert type(model.attention) is nn.MultiheadAttention and model.attention.num_heads == 3
    expected = model(x)
    cut(model, coupling, held.units, x)
    assert model.attention.num_heads == 2
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
