"""Surgery: a cut model equals its masked dense self, trains on with its optimiser, or nothing has changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.zoo import draw, error, masked, outputs
from taylorkern import verification
from taylorkern.coupling import couple
from taylorkern.surgery import SurgeryError, cut, fit_attributes
from tests.failures import fail_at_edit
from tests.networks import plain, randomised, residual
from tests.test_coupling import Auxiliary, Net, conv

IMAGE = torch.randn(2, 2, 8, 8)


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer):
    """Everything that a refused cut must leave alone, by identity and by bits."""
    tensors = [*model.parameters(), *model.buffers()]
    grads = [p.grad for p in model.parameters()]
    states = [v for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    held = [t for t in (*tensors, *grads, *states) if t is not None]
    attributes = [
        {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple))} | {"training": m.training}
        for m in model.modules()
    ]
    return [(id(t), t.data_ptr(), t.stride(), t.detach().clone()) for t in held], attributes, torch.get_rng_state()


def same(a, b) -> bool:
    tensors = all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a[0], b[0], strict=True))
    return tensors and a[1] == b[1] and torch.equal(a[2], b[2])


def double(model: nn.Module) -> nn.Module:
    return model.double()


def check_cut(model: nn.Module, x: Tensor, removed=None) -> None:
    """Cut and compare with masks that surgery does not know of, in evaluation and in training mode."""
    coupling = couple(model, x)
    removed = draw(coupling) if removed is None else torch.tensor(removed)
    with masked(model, coupling, removed):
        expected = [outputs(model, x, training) for training in (False, True)]
    after = cut(model, coupling, removed, x)
    for training in (False, True):
        assert error(expected[training], outputs(model, x, training)) < 1e-9
    again = couple(model, x)
    # One channel alone is not labelled again, and a convolution down to one group is a dense one.
    if all(len(units[units >= 0].unique()) != 1 for units in after.axes.values()):
        assert again.units == after.units
        assert again.fingerprint == after.fingerprint
    assert sum(c.flops for c in again.costs) == pytest.approx(sum(c.flops for c in after.costs))


@pytest.mark.parametrize("network", [residual, plain])
@pytest.mark.parametrize("seed", range(3))
def test_masked_equality(network, seed):
    torch.manual_seed(seed)
    check_cut(double(network()), torch.randn(2, 2, 8, 8, dtype=torch.float64))


def test_iterative_cuts():
    model = double(residual())
    coupling = dense = couple(model, IMAGE.double())
    for _ in range(4):
        coupling = cut(model, coupling, [0, len(coupling.units) - 1], IMAGE.double())
    assert len(coupling.units) == len(dense.units) - 8
    assert coupling.dense.tolist() == [u for u in range(len(dense.units)) if u in set(coupling.dense.tolist())]
    assert couple(model, IMAGE.double()).fingerprint == coupling.fingerprint


class Random(nn.Module):
    """A network of random blocks, whose last block feeds a classifier."""

    def __init__(self, plan: list[tuple[str, int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.kinds = [kind for kind, _ in plan]
        width = 2
        for kind, size in plan:
            layers, width = getattr(self, kind)(width, 2 * size)
            self.blocks.append(layers)
        self.head = nn.Linear(width * 16, 3)

    def conv(self, i, o):
        return nn.Sequential(conv(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)), o

    def residual(self, i, o):
        return nn.ModuleList([self.conv(i, o)[0], conv(o, i)]), i

    def concat(self, i, o):
        return nn.ModuleList([self.conv(i, o)[0], conv(i, o)]), i + 2 * o

    def split(self, i, o):
        return nn.ModuleList([conv(i, 2 * o), conv(o, o)]), 2 * o

    def shuffle(self, i, o):
        return conv(i, o + 2), o + 2  # two parts of one channel each could not be told from one part

    def depthwise(self, i, o):
        return nn.Sequential(conv(i, i, 3, padding=1, groups=i), nn.BatchNorm2d(i), nn.SiLU(), conv(i, o)), o

    def grouped(self, i, o):
        return nn.Sequential(conv(i, o), conv(o, 2 * o, 3, padding=1, groups=2), nn.ReLU()), 2 * o

    def excite(self, i, o):
        return nn.ModuleList([conv(i, o), conv(o, i)]), i

    def transposed(self, i, o):
        return nn.Sequential(nn.ConvTranspose2d(i, o, 2, 2), nn.PReLU(o), nn.MaxPool2d(2)), o

    def forward(self, x: Tensor) -> Tensor:
        for kind, layers in zip(self.kinds, self.blocks, strict=True):
            x = self.run(kind, layers, x)
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))

    def run(self, kind: str, layers, x: Tensor) -> Tensor:
        if kind == "residual":
            return F.relu(x + layers[1](layers[0](x)))
        if kind == "concat":
            return torch.cat([x, *(layer(x) for layer in layers)], 1)
        if kind == "split":
            a, b = layers[0](x).chunk(2, 1)
            return torch.cat([a, layers[1](b)], 1)
        if kind == "shuffle":
            y = layers(x)
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if kind == "excite":
            return x * torch.sigmoid(layers[1](layers[0](x.mean((2, 3), keepdim=True)).relu()))
        return layers(x)


KINDS = ["conv", "residual", "concat", "split", "shuffle", "depthwise", "grouped", "excite", "transposed"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3)), min_size=1, max_size=6), st.integers(0, 1000))
def test_random_networks(plan, seed):
    torch.manual_seed(seed)
    check_cut(double(randomised(Random([("conv", 2), *plan]))), torch.randn(2, 2, 6, 6, dtype=torch.float64))


def test_auxiliary_heads_follow():
    torch.manual_seed(0)
    check_cut(double(Auxiliary()), torch.randn(2, 3, 8, 8, dtype=torch.float64))


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_the_masked_dense_run(name):
    torch.manual_seed(0)
    dense = double(residual())
    xs, ys = torch.randn(8, 4, 2, 8, 8, dtype=torch.float64), torch.randint(0, 5, (8, 4))
    optimizer = OPTIMIZERS[name](dense.parameters())
    for x, y in zip(xs[:4], ys[:4], strict=True):
        step(dense, optimizer, x, y)
    thin = copy.deepcopy(dense)
    thin_optimizer = OPTIMIZERS[name](thin.parameters())
    thin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    coupling = couple(dense, xs[0])
    removed = draw(coupling)
    parameters = list(thin.parameters())
    after = cut(thin, coupling, removed, xs[0], [thin_optimizer])
    stays = coupling.staying(removed)
    with masked(dense, coupling, removed):
        for x, y in zip(xs[4:], ys[4:], strict=True):
            expected, got = step(dense, optimizer, x, y), step(thin, thin_optimizer, x, y)
            assert got.item() == pytest.approx(expected.item(), rel=1e-9)
    assert len(after.units) == int(stays[:-1].sum())
    assert parameters == list(thin.parameters()) or all(
        a is b for a, b in zip(parameters, thin.parameters(), strict=True)
    )
    for key, value in dense.state_dict().items():
        for dim in range(value.dim()):
            if (key, dim) in coupling.axes:
                value = value.index_select(dim, stays[coupling.axes[key, dim]].nonzero().flatten())
        torch.testing.assert_close(thin.state_dict()[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_living_graph_of_the_step_before_does_not_stop_training(dtype):
    model = residual().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(4, 2, 8, 8, dtype=dtype), torch.randint(0, 5, (4,))
    loss = step(model, optimizer, x, y)  # alive until the end: its graph remembers the dense shapes
    cut(model, couple(model, x), [0, 7], x, [optimizer])
    for _ in range(2):
        step(model, optimizer, x, y)
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert loss.grad_fn is not None


def test_hooks_on_parameters_survive():
    model, calls = residual(), []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    x, y = torch.randn(4, 2, 8, 8), torch.randint(0, 5, (4,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = step(model, optimizer, x, y)
    cut(model, couple(model, x), [0], x, [optimizer])
    step(model, optimizer, x, y)
    assert calls == [(6, 2, 3, 3), (5, 2, 3, 3)]
    assert loss.requires_grad


def test_identity_dtype_layout_and_flags_stay():
    model = residual().to(memory_format=torch.channels_last).train()
    model[0].weight.requires_grad_(False)
    model[3].bn1.eval()
    model(IMAGE).sum().backward()
    before = [(p, p.requires_grad, p.dtype, p.grad is None) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    cut(model, couple(model, IMAGE), [0, 1, 7], IMAGE)
    for p, (old, requires_grad, dtype, no_grad) in zip(model.parameters(), before, strict=True):
        assert p is old
        assert (p.requires_grad, p.dtype, p.grad is None) == (requires_grad, dtype, no_grad)
        assert p.grad is None or p.grad.shape == p.shape
    assert modes == [m.training for m in model.modules()]
    weight = model[3].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert model[0].weight.stride(1) == 1


def test_gradients_are_cut_at_the_same_indices():
    model = plain()
    model(IMAGE).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    cut(model, couple(model, IMAGE), [1, 7], IMAGE)
    rows, columns = [0, 2, 3, 4, 5], [0, 2, 3, 4, 5]
    assert torch.equal(model[0].weight.grad, grads["0.weight"][rows])
    assert torch.equal(model[2].weight.grad, grads["2.weight"][rows][:, columns])


def test_attributes_follow():
    layers = [conv(2, 4), nn.PReLU(4), conv(4, 8, groups=4), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 2))
    coupling = couple(model, IMAGE)
    assert [len(unit.places) for unit in coupling.units] == [2, 2] + [1] * 6
    cut(model, coupling, [0, 2, 4], IMAGE)
    assert (model[0].out_channels, model[1].num_parameters) == (2, 2)
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (2, 4, 2)
    assert (model[3].in_channels, model[3].out_channels, model[3].groups) == (4, 2, 1)
    assert (model[4].num_features, model[7].in_features, model[7].out_features, model[8].in_features) == (2, 32, 4, 4)


def test_fit_attributes_changes_only_what_does_not_fit():
    model = nn.Sequential(
        conv(2, 4, groups=2),
        nn.BatchNorm2d(4, affine=False),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.GroupNorm(2, 4),
        nn.Embedding(3, 4),
    )
    text = repr(model)
    fit_attributes(model)
    assert repr(model) == text


def test_shared_weights_are_cut_once():
    net = Net(
        lambda net, x: net.head(net.b(net.a(net.stem(x)).relu()).relu()),
        stem=conv(2, 4),
        a=conv(4, 4),
        b=conv(4, 4),
        head=conv(4, 2),
    )
    net.b.weight = net.a.weight
    cut(net, couple(net, IMAGE), [1], IMAGE)
    assert net.b.weight is net.a.weight
    assert net.a.weight.shape == (3, 3, 1, 1)
    assert (net.b.out_channels, net.b.in_channels) == (3, 3)


def test_extra_buffers_are_cut():
    net = Net(lambda net, x: net.head(net.conv(x) * net.mask), conv=conv(2, 4), head=conv(4, 2))
    net.register_buffer("mask", torch.rand(4, 1, 1))
    mask = net.mask.clone()
    cut(net, couple(net, IMAGE), [1, 2], IMAGE)
    assert torch.equal(net.mask, mask[[0, 3]])


def quietly_wrong(net, x):
    """Normalises by a number of channels: it runs after any cut, and computes something else."""
    x = net.conv(x)
    return net.head((x / x.shape[1]).mean((2, 3)))


def wrong_at_the_end(net, x):
    x = net.conv(x)
    return net.head(x.mean((2, 3))) * x.shape[1]


REFUSED = {
    "at the end": (wrong_at_the_end, r"differ from the masked dense one at output 0; operations since head: aten\.mul"),
    "different": (quietly_wrong, r"differ from the masked dense one at head; operations since conv: aten\.div"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refusals_name_the_cause_and_change_nothing(case, dtype):
    apply, message = REFUSED[case]
    model = Net(apply, conv=conv(2, 4), head=nn.Linear(4, 2)).to(dtype)
    x = IMAGE.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    coupling = couple(model, x)
    before = snapshot(model, optimizer)
    with pytest.raises(SurgeryError, match=message) as caught:
        cut(model, coupling, [1, 3], x, [optimizer])
    assert caught.value.unit == 1
    assert caught.value.operation.startswith("aten.")
    assert same(before, snapshot(model, optimizer))
    model(x).sum().backward()


def test_a_wrong_branch_behind_a_zero_is_still_found():
    """The last normalisation of a branch often starts at zero, where no output would show what is wrong inside."""

    def apply(net, x):
        x = net.conv(x)
        inner = net.inner(x / x.shape[1])
        return net.head((x + 0 * inner).mean((2, 3)))

    model = Net(apply, conv=conv(2, 4), inner=conv(4, 4), head=nn.Linear(4, 2))
    with pytest.raises(SurgeryError, match="at inner"):
        cut(model, couple(model, IMAGE), [0], IMAGE)


class TrainsUnevenly(Auxiliary):
    """Its branch of training refuses a width, but not the one that the coupling tried."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        x = self.norm(self.body(x)).mean((2, 3))
        assert self.refusing is None or x.shape[1] != self.refusing, "a width that this network does not take"
        return self.head(x), self.aux(x)


def test_training_branches_must_run_too():
    model = TrainsUnevenly()
    model.refusing = None
    x = torch.randn(2, 3, 8, 8)
    coupling = couple(model, x)
    model.refusing = model.body.out_channels - 1
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=r"refused.*fails"):
        cut(model, coupling, [0], x)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([99], "units are 0..14"),
        ([-1], "units are 0..14"),
        ([1, 1], "twice"),
        ([[1]], "1-D"),
        ([0.5], "integers"),
        ([True], "integers"),
    ],
)
def test_bad_requests(removed, message):
    model = plain()
    coupling, before = couple(model, IMAGE), snapshot(model)
    message = message.replace("14", str(len(coupling.units) - 1))
    with pytest.raises(ValueError, match=message):
        cut(model, coupling, torch.tensor(removed), IMAGE)
    assert same(before, snapshot(model))


def test_nothing_may_become_empty():
    model = plain()
    coupling, before = couple(model, IMAGE), snapshot(model)
    with pytest.raises(ValueError, match=r"nothing of 0\.weight dim 0"):
        cut(model, coupling, range(6), IMAGE)
    assert same(before, snapshot(model))


def test_nothing_removed_is_nothing_done():
    model = plain()
    coupling, before = couple(model, IMAGE), snapshot(model)
    assert cut(model, coupling, [], IMAGE) is coupling
    assert same(before, snapshot(model))


def test_a_stale_coupling_is_refused():
    model = plain()
    coupling = couple(model, IMAGE)
    cut(model, coupling, [0], IMAGE)
    before = snapshot(model)
    with pytest.raises(ValueError, match="not this model's"):
        cut(model, coupling, [1], IMAGE)
    assert same(before, snapshot(model))


def test_an_optimiser_whose_state_cannot_be_cut_is_refused_by_name():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(IMAGE).sum().backward()
    optimizer.step()
    optimizer.state[model[0].weight]["factor"] = torch.zeros(6)
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    with pytest.raises(SurgeryError, match=r"SGD's 'factor' of 0\.weight has shape \(6,\)"):
        cut(model, coupling, [0], IMAGE, [optimizer])
    assert same(before, snapshot(model, optimizer))


def test_example_inputs_that_do_not_fit_are_refused():
    model = plain()
    coupling, wrong = couple(model, IMAGE), torch.randn(1, 3, 8, 8)
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not run on the example inputs"):
        cut(model, coupling, [0], wrong)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_failure_in_the_middle_of_the_swap_is_rolled_back(failing, monkeypatch):
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    model(IMAGE).sum().backward()
    optimizer.step()
    coupling, before = couple(model, IMAGE), snapshot(model, optimizer)
    fail_at_edit(monkeypatch, failing)
    with pytest.raises(MemoryError, match="injected"):
        cut(model, coupling, [0, 8], IMAGE, [optimizer])
    assert same(before, snapshot(model, optimizer))


def test_a_failure_while_comparing_is_rolled_back(monkeypatch):
    model = residual()
    coupling, before = couple(model, IMAGE), snapshot(model)

    def failing(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "_compare", failing)
    with pytest.raises(KeyboardInterrupt):
        cut(model, coupling, [0], IMAGE)
    assert same(before, snapshot(model))


def hard_coded(net, x):
    return net.head(net.conv(x.float()).relu().mean((2, 3)))


def single_inside(net, x):
    return net.head(net.conv(x).float().relu().to(x.dtype).mean((2, 3)))


def single_sums(net, x):
    rows = net.conv(x).relu().mean((2, 3))
    return net.head(rows) + nn.functional.linear(rows.float(), net.head.weight.float()).to(x.dtype)


@pytest.mark.parametrize("apply", [hard_coded, single_inside, single_sums])
def test_models_bound_to_single_precision_are_verified_in_it(apply):
    model = Net(apply, conv=conv(2, 64), head=nn.Linear(64, 2))
    cut(model, couple(model, IMAGE), range(0, 64, 3), IMAGE)
    assert model.head.in_features == 42


def test_single_precision_constants_do_not_loosen_the_comparison():
    def apply(net, x):
        x = net.conv(x) * torch.linspace(0, 1, x.shape[-1])
        return net.head((x * (1 + 1e-6 * x.shape[1])).mean((2, 3)))

    model = Net(apply, conv=conv(2, 4), head=nn.Linear(4, 2))
    with pytest.raises(SurgeryError, match="at head"):
        cut(model, couple(model, IMAGE), [0], IMAGE)


def test_models_that_overwrite_their_input_are_cut_and_leave_the_example_alone():
    model = nn.Sequential(
        nn.ReLU(inplace=True), Net(lambda net, x: net.a(x.add_(1)), a=conv(2, 4)), conv(4, 2)
    ).double()
    x = IMAGE.double()
    before = x.clone()
    cut(model, couple(model, x), [0], x)
    assert torch.equal(x, before)


def test_unbatched_linear_layers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3)
    cut(model, couple(model, x), [1], x)
    assert model[0].out_features == model[2].in_features == 3


def test_half_precision_models_are_cut():
    model = residual().bfloat16()
    cut(model, couple(model, IMAGE.bfloat16()), [0, 8], IMAGE.bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_without_verification_the_network_is_the_same():
    torch.manual_seed(0)
    a = residual()
    b = copy.deepcopy(a)
    cut(a, couple(a, IMAGE), [0, 7, 9], IMAGE)
    cut(b, couple(b, IMAGE), [0, 7, 9], IMAGE, verify=False)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_network_of_non_finite_numbers_is_refused_for_that():
    model = residual()
    model[4].conv1.weight.data.fill_(torch.inf)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=r"non-finite numbers at 4\.conv1") as refused:
        cut(model, couple(model, IMAGE), [0], IMAGE)
    assert refused.value.module == "4.conv1" and same(before, snapshot(model))


def test_layers_that_mix_tokens_see_channels_as_positions():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.tokens, self.head = nn.Linear(3, 6), nn.Linear(5, 5), nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.tokens(x.transpose(1, 2)).transpose(1, 2)).relu().mean(1))

    model, x = Mixer().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    coupling = couple(model, x)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.head.weight[:, [1, 4]] = 0
    cut(model, coupling, [1, 4], x)
    assert torch.allclose(model(x), expected(x), rtol=0, atol=1e-12)
