"""Scores of attention's heads are the gradients of gates that multiply what each head hands on."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern import Scores, convert, prune
from taylorkern.emission import observed

DIM, HEADS, WIDTH = 6, 3, 2


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, DIM)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, WIDTH).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def per_head(heads: Tensor, z: Tensor) -> Tensor:
    """Head h [N, T, H·D] of sample n times z[n, h]."""
    return (heads.unflatten(-1, (HEADS, -1)) * z[:, None, :, None]).flatten(2)


@contextmanager
def gated(attention: nn.Module, z: Tensor):
    hook = attention.proj.register_forward_pre_hook(lambda module, inputs: per_head(inputs[0], z))
    yield
    hook.remove()


@contextmanager
def gated_inside(attention: nn.Module, z: Tensor):
    with observed(lambda layer, heads, dim: per_head(heads, z)):
        yield


@pytest.mark.parametrize(("kind", "gates"), [(ByHand, gated), (Torchs, gated_inside)])
def test_heads_score_by_what_they_hand_on(kind, gates):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Flatten(), nn.Linear(4 * DIM, 3)).double()
    x, target = torch.randn(5, 4, DIM, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    convert(model)
    scores = Scores(model, x[:1])
    F.cross_entropy(model(x), target).backward()
    found = scores.importance("taylor_fo")[:HEADS], scores.importance("taylor_fg")[:HEADS]
    assert [len(unit.places) for unit in scores.units[:HEADS]] == [WIDTH] * HEADS
    scores.detach()

    z = torch.ones(5, HEADS, dtype=torch.float64, requires_grad=True)
    with gates(model[0], z):
        (s,) = torch.autograd.grad(F.cross_entropy(model(x), target), z)
    torch.testing.assert_close(found[0], s.sum(0).square(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found[1], 5 * s.square().sum(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [ByHand, Torchs])
def test_heads_are_pruned_and_training_goes_on(kind):
    model = convert(nn.Sequential(kind(), nn.Flatten(), nn.Linear(4 * DIM, 3)).double())
    x = torch.randn(5, 4, DIM, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    scores = Scores(model, x[:1])
    model(x).square().mean().backward()
    optimizer.step()
    importance = scores.importance("taylor_fo")
    importance[1] = 0  # a head
    importance[HEADS:] += 1e9
    prune(
        model, x[:1], importance, target=(len(scores.units) - 1) / len(scores.units), of="channels", optimizer=optimizer
    )
    attention = model[0].attention if kind is Torchs else model[0]
    assert attention.num_heads == HEADS - 1
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert scores.importance("taylor_fo").isfinite().all()
