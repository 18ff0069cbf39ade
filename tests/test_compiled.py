"""Scored networks under torch.compile: one graph, the same scores, running statistics and curvature as eager ones."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import taylorkern as tk
from tests.cases import distance
from tests.loops import network, samples
from tests.networks import Block, residual

CRITERIA = ("taylor_fo", "taylor_fg", "taylor_so_fisher")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def loss_of(forward, x, target):
    return nn.functional.cross_entropy(forward(x), target)


def alike(found, wanted, names=CRITERIA):
    return max(distance(found.importance(name), wanted.importance(name)) for name in names)


def images(count, seed, size=8, channels=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.randint(0, 5, (count,), generator=generator)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_batch_statistics_and_gradients_are_the_eager_network_s(backend, layout):
    torch.manual_seed(0)
    model = tk.convert(residual()).to(memory_format=layout)
    other = copy.deepcopy(model)
    wanted, found = tk.Scores(model, images(1, 0)[0]), tk.Scores(other, images(1, 0)[0])
    forward = compiled(other, backend)
    for seed in range(3):
        x, target = images(8, seed)
        for of in (model, forward):
            loss_of(of, x.to(memory_format=layout), target).backward()
    assert found.minibatches == 3 and alike(found, wanted) < 1e-4
    for name, tensor in model.state_dict().items():
        assert distance(other.state_dict()[name].double(), tensor.double()) < 1e-5, name
    for name, parameter in model.named_parameters():
        assert distance(other.get_parameter(name).grad, parameter.grad) < 1e-4, name


def test_batch_sizes_may_change_without_a_compilation_each():
    eager, model = network(), network()
    wanted, found = (tk.Scores(of, samples()[0][0][:1]) for of in (eager, model))
    forward = compiled(model)
    for count in (4, 4, 7, 5, 9, 3):
        x, target = images(count, count, channels=3)
        loss_of(eager, x, target).backward()
        loss_of(forward, x, target).backward()
    assert found.minibatches == 6 and alike(found, wanted) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2


class Repeated(nn.Module):
    """Blocks of one class that are compiled one by one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(6) for _ in range(10)))
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


def test_blocks_compiled_one_by_one_share_their_code():
    torch.manual_seed(0)
    model = tk.convert(Repeated())
    wanted = tk.Scores(model, images(1, 0)[0])
    other = copy.deepcopy(model)
    found = tk.Scores(other, images(1, 0)[0])
    for block in other.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x, target = images(8, seed)
        loss_of(model, x, target).backward()
        loss_of(other, x, target).backward()
    assert found.minibatches == 2 and alike(found, wanted) < 1e-4
    assert counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_after_a_cut_one_compilation_more(backend):
    torch.manual_seed(0)
    model = tk.convert(residual())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = tk.Pruner(model, images(1, 0)[0], optimizer=optimizer, target=0.5, every=3, step=8)
    forward = compiled(model, backend)
    graphs, went = [], []
    for step in range(9):
        x, target = images(8, step)
        optimizer.zero_grad()
        loss_of(forward, x, target).backward()
        optimizer.step()
        went.append(len(pruner.step()))
        graphs.append(counters["stats"]["unique_graphs"])
    assert went[2] == 8 and went[5]
    assert graphs[:3] == [1] * 3 and graphs[3:6] == [2] * 3 and graphs[6:] == [3] * 3
    x = images(8, 99)[0]
    assert distance(forward(x), copy.deepcopy(model)(x)) < 1e-4


def test_several_losses_of_one_forward_with_the_graph_kept_are_one_minibatch():
    eager, model = network(), network()
    wanted, found = (tk.Scores(of, samples()[0][0][:1]) for of in (eager, model))
    forward = compiled(model)
    for x, target in samples():
        for of in (eager, forward):
            logits = of(x)
            (nn.functional.cross_entropy(logits, target) / 2).backward(retain_graph=True)
            logits.square().mean().backward()
    assert wanted.minibatches == found.minibatches == 2
    assert alike(found, wanted) < 1e-5


def test_gradients_that_are_only_asked_for_do_not_score():
    model = network()
    scores = tk.Scores(model, samples()[0][0][:1])
    forward = compiled(model)
    x, target = samples()[0]
    torch.autograd.grad(loss_of(forward, x, target), model.stem.weight)
    assert scores.minibatches == 0
    loss_of(forward, x, target).backward()
    assert scores.minibatches == 1


@pytest.mark.parametrize("method", ["exact", "sketch"])
@torch._functorch.config.patch(donated_buffer=False)
def test_curvature_of_compiled_logits(method):
    eager, model = network(), network()
    wanted, found = (tk.Scores(of, samples()[0][0][:1], gram="full") for of in (eager, model))
    forward = compiled(model, "inductor")
    for x, target in samples():
        for of, scores in ((eager, wanted), (forward, found)):
            logits = of(x)
            scores.curvature(logits, target, method=method, generator=torch.Generator().manual_seed(3))
            nn.functional.cross_entropy(logits, target).backward()
    assert found.minibatches == 2 and alike(found, wanted, ("taylor_so", "obd", "taylor_fo")) < 1e-5
    assert distance(found.gram()[0].matrix, wanted.gram()[0].matrix) < 1e-5


def test_curvature_where_the_compiler_gave_memory_away_says_what_to_do(monkeypatch):
    def refused(*arguments, **options):
        raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")

    model = network()
    scores = tk.Scores(model, samples()[0][0][:1])
    x, target = samples()[0]
    logits = compiled(model)(x)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="donated_buffer = False"):
        patch.setattr(torch.autograd, "grad", refused)
        scores.curvature(logits, target)
    nn.functional.cross_entropy(logits, target).backward()
    assert scores.minibatches == 1


class Doubled(nn.Linear):
    """A subclass with a forward of its own, which a hook gates."""

    def forward(self, x):
        return 2 * super().forward(x)


def attention():
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), Doubled(8, 6), nn.Linear(6, 3))


def test_attention_and_hooked_layers():
    torch.manual_seed(0)
    eager = tk.convert(attention())
    model = copy.deepcopy(eager)
    x = torch.randn(5, 4, 8)
    wanted, found = tk.Scores(eager, x), tk.Scores(model, x)
    assert {layer.partition(".")[0] for layer in found.coupling.layers} >= {"0", "1"}
    forward = compiled(model)
    for of in (eager, forward):
        of(x).square().mean().backward()
    assert found.minibatches == 1 and alike(found, wanted) < 1e-5


def test_scores_that_are_gone_leave_compiled_code_running():
    model = network()
    scores = tk.Scores(model, samples()[0][0][:1])
    forward = compiled(model)
    x, target = samples()[0]
    loss_of(forward, x, target).backward()
    assert scores.minibatches == 1
    del scores
    loss_of(forward, x, target).backward()
    again = tk.Scores(model, samples()[0][0][:1])
    loss_of(forward, x, target).backward()
    assert again.minibatches == 1
    again.detach()
    loss_of(forward, x, target).backward()
    assert again.minibatches == 1


class Twice(nn.Module):
    """A layer that runs twice on the same input, which a compiler might make one call."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out((self.into(x) + self.into(x)).relu())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_that_run_twice_on_the_same_input(backend):
    torch.manual_seed(0)
    eager = tk.convert(Twice())
    model = copy.deepcopy(eager)
    x = torch.randn(7, 4)
    wanted, found = tk.Scores(eager, x), tk.Scores(model, x)
    for of in (eager, compiled(model, backend)):
        of(x).square().mean().backward()
    assert alike(found, wanted) < 1e-5


def test_transforms_inside_of_compiled_code_are_not_scored():
    model = tk.convert(Twice())
    scores = tk.Scores(model, torch.rand(2, 4))
    gradients = torch.compile(lambda x: torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(x), backend="eager")
    x = torch.randn(7, 4)
    expected = torch.autograd.grad(model(x).sum(), x.requires_grad_())[0] if x.requires_grad_() is x else None
    assert distance(gradients(x), expected) < 1e-5 and scores.minibatches == 0
