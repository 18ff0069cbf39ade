"""Every optimiser of torch goes on after a cut and under a mask as in the masked dense run, or is refused by name."""

import copy

import pytest
import torch
from torch import nn, optim

import taylorkern as tk
from taylorkern.masking import mask
from taylorkern.surgery import SurgeryError, cut
from tests.goingon import AFTER, BEFORE, NETWORKS, Mixed, assert_same, batch, coupled, left, masked_by_hand, run, some
from tests.test_surgery import same, snapshot

STEPS = range(BEFORE, BEFORE + AFTER)
EACH_FOR_ITSELF = {
    "sgd": lambda p: optim.SGD(p, 0.05),
    "sgd, dampened": lambda p: optim.SGD(p, 0.05, momentum=0.9, dampening=0.3, weight_decay=1e-2),
    "sgd, maximising": lambda p: optim.SGD(p, 1e-3, momentum=0.9, maximize=True, foreach=True),
    "sgd, fused": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adam, a tensor's rate": lambda p: optim.Adam(p, torch.tensor(1e-2), amsgrad=True, capturable=False),
    "adam, fused": lambda p: optim.Adam(p, 1e-2, amsgrad=True, fused=True),
    "adamw, foreach": lambda p: optim.AdamW(p, 1e-2, foreach=True),
    "adamw, one by one": lambda p: optim.AdamW(p, 1e-2, foreach=False, amsgrad=True),
    "nadam": lambda p: optim.NAdam(p, 1e-2, weight_decay=1e-2),
    "radam": lambda p: optim.RAdam(p, 1e-2, decoupled_weight_decay=True, weight_decay=1e-2),
    "adamax": lambda p: optim.Adamax(p, 1e-2),
    "adagrad": lambda p: optim.Adagrad(p, 1e-2, lr_decay=1e-3, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p, 1.0),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-3, momentum=0.5, centered=True, weight_decay=1e-2),
    "rprop": lambda p: optim.Rprop(p, 1e-3),
    "asgd": lambda p: optim.ASGD(p, 1e-2, t0=8),
}


@pytest.mark.parametrize("how", [cut, mask])
@pytest.mark.parametrize("name", EACH_FOR_ITSELF)
def test_it_goes_on_as_the_masked_dense_run(name, how):
    dense, other = (run(NETWORKS["mixed"], EACH_FOR_ITSELF[name]) for _ in range(2))
    coupling = coupled(dense.model)
    removed = some(coupling)
    how(other.model, coupling, removed, batch(0)[0], [other.optimizer], copies=other.average)
    with masked_by_hand(dense.model, coupling, removed):
        expected = dense.train(STEPS)
    assert other.train(STEPS) == pytest.approx(expected, rel=1e-9)
    assert_same(left(other.tensors(), coupling, removed), left(dense.tensors(), coupling, removed))


@pytest.mark.parametrize("name", EACH_FOR_ITSELF)
def test_under_a_mask_it_leaves_nought_at_nought(name):
    masked = run(NETWORKS["mixed"], EACH_FOR_ITSELF[name])
    coupling = coupled(masked.model)
    removed = some(coupling)
    mask(masked.model, coupling, removed, batch(0)[0], [masked.optimizer], copies=masked.average)
    masked.train(STEPS)
    for body in (masked.model, masked.average.module):
        named = dict(body.named_parameters())
        for name, dim in coupling.consumers:
            gone = torch.isin(coupling.axes[name, dim], removed).nonzero().flatten()
            assert not named[name].index_select(dim, gone).any()
            assert named[name].any()


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2]


def test_one_that_looks_at_whole_matrices_goes_on_with_what_is_left():
    """Muon's momentum is cut alike; what it makes of it is about the matrix that is left."""
    model = NETWORKS["tokens"]().double()
    others = optim.SGD([p for p in model.parameters() if p.dim() != 2], 0.1)
    muon = optim.Muon(matrices(model), 1e-2)
    for step in range(2):
        nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        muon.step()
    coupling = coupled(model)
    removed = some(coupling)
    stays = (~torch.isin(coupling.axes["up.0.weight", 0], removed)).nonzero().flatten()
    before = muon.state[model.up[0].weight]["momentum_buffer"].clone()
    cut(model, coupling, removed, batch(0)[0], [muon, others])
    assert torch.equal(muon.state[model.up[0].weight]["momentum_buffer"], before[stays])
    nn.functional.cross_entropy(model(batch(2)[0]), batch(2)[1]).backward()
    muon.step()
    assert all(p.isfinite().all() for p in model.parameters())


def closing(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    return closure


REFUSED = {
    "LBFGS": (lambda p: optim.LBFGS(p, 0.1, max_iter=2), "LBFGS's .* of stem.weight is about all parameters together"),
    "Adafactor": (lambda p: optim.Adafactor(p, 1e-2), r"Adafactor's 'row_var' of stem.weight has shape \(6, 2, 3, 1\)"),
}


@pytest.mark.parametrize("how", [cut, mask])
@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name_and_go_on_without(name, how):
    build, message = REFUSED[name]
    model = Mixed().double()
    optimizer = build(model.parameters())
    coupling = coupled(model)
    optimizer.step(closing(model, optimizer))
    before = snapshot(model, optimizer)
    with pytest.raises(SurgeryError, match=message):
        how(model, coupling, some(coupling), batch(0)[0], [optimizer])
    assert same(before, snapshot(model, optimizer))
    optimizer.step(closing(model, optimizer))


def test_one_that_has_not_stepped_goes_on_whatever_it_is():
    model = Mixed().double()
    optimizer = optim.LBFGS(model.parameters(), 0.1, max_iter=2)
    coupling = coupled(model)
    cut(model, coupling, some(coupling), batch(0)[0], [optimizer])
    first = optimizer.step(closing(model, optimizer))
    assert optimizer.step(closing(model, optimizer)) < first


class Nested(optim.Optimizer):
    """Keeps the gradients of the last steps in a list, in single precision, and a number of them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            state["last"] = [*state.get("last", [])[-2:], p.grad.float().clone()]
            state["few"] = torch.tensor(len(state["last"]))
            p -= 0.05 * sum(state["last"]).to(p)


@pytest.mark.parametrize("how", [cut, mask])
def test_state_in_lists_and_other_dtypes_is_cut_alike(how):
    dense, other = (run(NETWORKS["mixed"], Nested) for _ in range(2))
    coupling = coupled(dense.model)
    removed = some(coupling)
    how(other.model, coupling, removed, batch(0)[0], [other.optimizer], copies=other.average)
    with masked_by_hand(dense.model, coupling, removed):
        dense.train(STEPS[:2])
    other.train(STEPS[:2])
    state = other.optimizer.state[other.model.wide.weight]
    assert len(state["last"]) == 3 and state["last"][0].dtype == torch.float32 and int(state["few"]) == 3
    for name, tensor in left(other.tensors(), coupling, removed).items():
        expected = left(dense.tensors(), coupling, removed)[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)  # single precision


class Embedded(nn.Module):
    """A table of rows whose gradients are sparse, added to what a layer makes of other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.other, self.head = nn.Embedding(9, 6, sparse=True), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, rows, x):
        return self.head(torch.tanh(self.rows(rows) + self.other(x)))


def test_sparse_gradients_are_cut_alike():
    torch.manual_seed(0)
    models = [Embedded().double()]
    models.append(copy.deepcopy(models[0]))
    inputs = (torch.tensor([0, 3, 3, 8]), torch.randn(4, 3, dtype=torch.float64))
    optimizers = [
        (optim.SparseAdam(m.rows.parameters(), 0.1), optim.Adam([*m.other.parameters(), *m.head.parameters()], 0.1))
        for m in models
    ]

    def train(which, steps):
        for _ in range(steps):
            models[which].zero_grad()
            models[which](*inputs).square().sum().backward()
            for optimizer in optimizers[which]:
                optimizer.step()

    for which in range(2):
        train(which, 2)
    coupling = tk.couple(models[0], inputs)
    removed, stays = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    cut(models[1], coupling, removed, inputs, optimizers[1])
    grad = models[1].rows.weight.grad
    assert grad.is_sparse and torch.equal(grad.to_dense(), models[0].rows.weight.grad.to_dense()[:, stays])
    with masked_by_hand(models[0], coupling, removed):
        train(0, AFTER)
    train(1, AFTER)
    torch.testing.assert_close(models[1].rows.weight, models[0].rows.weight[:, stays], rtol=1e-9, atol=1e-12)
    for key, value in optimizers[1][0].state[models[1].rows.weight].items():
        if torch.is_tensor(value):
            expected = optimizers[0][0].state[models[0].rows.weight][key][:, stays]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_moments_keep_their_memory_format_and_identity_of_others():
    model = Mixed().double().to(memory_format=torch.channels_last)
    frozen, elsewhere = model.norm.weight.requires_grad_(False), nn.Parameter(torch.ones(3, dtype=torch.float64))
    alien = optim.Adafactor([nn.Parameter(torch.ones(3, 4))])
    alien.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    alien.step()
    optimizer = optim.AdamW([{"params": model.parameters()}, {"params": [elsewhere], "lr": 0.5}], 1e-2)
    elsewhere.grad = torch.ones(3, dtype=torch.float64)
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    kept = optimizer.state[elsewhere]["exp_avg"]
    coupling = coupled(model)
    cut(model, coupling, some(coupling), batch(0)[0], [optimizer, alien])
    moment = optimizer.state[model.right.weight]["exp_avg"]
    assert moment.shape == model.right.weight.shape == model.right.weight.grad.shape
    assert moment.stride() == model.right.weight.stride() and moment.stride(1) == 1
    assert frozen not in optimizer.state and not frozen.requires_grad and len(frozen) < 6
    assert optimizer.state[elsewhere]["exp_avg"] is kept
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
