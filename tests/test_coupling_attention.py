"""Heads as units: attention in the forms that people write it, and the attributes that count its heads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylorkern.coupling import Coupling, couple
from taylorkern.surgery import cut

DIM, HEADS, WIDTH = 8, 3, 5  # of the stream, of heads in it, and of each
TOKENS = torch.randn(1, 4, DIM, dtype=torch.float64)


class Attention(nn.Module):
    """Queries, keys and values of HEADS × WIDTH channels in one layer; ``heads`` splits them up."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner_dim = HEADS, WIDTH, HEADS * WIDTH
        self.qkv = nn.Linear(DIM, 3 * HEADS * WIDTH)
        self.proj = nn.Linear(HEADS * WIDTH, DIM)

    def heads(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        return self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.merge(self.attend(*self.heads(x))))


class ByHand(Attention):
    def attend(self, q, k, v):
        weights = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return weights.softmax(-1) @ v


class Chunked(Attention):
    def heads(self, x):
        return [t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]


class Einsum(Attention):
    def attend(self, q, k, v):
        return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


class Counted(Attention):
    """Merges by an attribute of its own."""

    def merge(self, x):
        return x.transpose(1, 2).reshape(x.shape[0], -1, self.inner_dim)


class Biased(ByHand):
    """Adds a table of biases, one for each head and pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, HEADS))
        self.register_buffer("index", torch.randint(7, (4, 4)))

    def attend(self, q, k, v):
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        return (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


def net(attention: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM), attention, nn.Linear(DIM, 2)).double()


def masked(model: nn.Module, coupling: Coupling, removed: list[int]) -> nn.Module:
    """A copy whose consumers see nothing of these units."""
    other = copy.deepcopy(model)
    for name, dim in coupling.consumers:
        gone = torch.isin(coupling.axes[name, dim], torch.tensor(removed))
        with torch.no_grad():
            other.get_parameter(name).index_fill_(dim, gone.nonzero().flatten(), 0)
    return other


class RotatedInPart(Attention):
    """Turns a part of each head's channels, which may be all of them: then the rest is empty."""

    def attend(self, q, k, v):
        q, k = (torch.cat([t[..., :WIDTH].flip(2), t[..., WIDTH:]], -1) for t in (q, k))
        return super().attend(q, k, v)


KINDS = [Attention, ByHand, Chunked, Einsum, Counted, Biased, RotatedInPart]
VALUES = [tuple(("2.qkv", 2 * HEADS * WIDTH + h * WIDTH + d) for d in range(WIDTH)) for h in range(HEADS)]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_units_with_gates_on_their_values(kind):
    model = net(kind())
    coupling = couple(model, TOKENS)
    heads = [unit.places for unit in coupling.units if unit.places[0][0] == "2.qkv"]
    assert heads == VALUES
    number = coupling.layers["2.qkv"][VALUES[0][0][1]]
    rows = coupling.axes["2.qkv.weight", 0].view(3, HEADS, WIDTH)
    assert (rows == torch.arange(HEADS).view(1, HEADS, 1) + number).all()
    assert coupling.axes["2.proj.weight", 1].tolist() == rows[0].flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_attention_is_the_masked_one(kind):
    model = net(kind())
    coupling = couple(model, TOKENS)
    removed = [int(coupling.layers["2.qkv"].max()), int(coupling.layers["2.proj"][1])]  # the last head
    expected = masked(model, coupling, removed)
    after = cut(model, coupling, removed, TOKENS)
    x = torch.randn(3, 4, DIM, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-12)
    assert model[2].qkv.out_features == 3 * (HEADS - 1) * WIDTH
    assert len(after.units) == len(coupling.units) - 2
    assert all(
        len(units) == getattr(model.get_submodule(path), name) for (path, name), units in after.attributes.items()
    )


def test_attributes_that_count_heads_follow():
    model = net(Counted())
    coupling = couple(model, TOKENS)
    cut(model, coupling, [int(coupling.layers["2.qkv"].max())], TOKENS)
    assert (model[2].num_heads, model[2].head_dim, model[2].inner_dim) == (HEADS - 1, WIDTH, (HEADS - 1) * WIDTH)


def test_keys_and_values_of_several_heads_go_with_all_of_them():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.num_kv_heads = 4, 2
            self.q, self.kv, self.proj = (
                nn.Linear(DIM, 4 * WIDTH),
                nn.Linear(DIM, 2 * 2 * WIDTH),
                nn.Linear(4 * WIDTH, DIM),
            )

        def forward(self, x):
            n, t, _ = x.shape
            q = self.q(x).view(n, t, self.num_heads, WIDTH).transpose(1, 2)
            k, v = self.kv(x).view(n, t, 2, self.num_kv_heads, WIDTH).permute(2, 0, 3, 1, 4)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = net(Grouped())
    coupling = couple(model, TOKENS)
    groups = coupling.axes["2.q.weight", 0].view(4, WIDTH)[:, 0].tolist()
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert coupling.attributes["2", "num_heads"].tolist() == groups
    cut(model, coupling, [groups[3]], TOKENS)
    assert (model[2].num_heads, model[2].num_kv_heads) == (2, 1)


@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_attention_loses_heads_and_stays_itself_without(batch_first):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, batch_first=batch_first)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model, x = Wrapped().double(), torch.randn(2, 5, 12, dtype=torch.float64)
    coupling = couple(model, x)
    assert type(model.attention) is nn.MultiheadAttention
    assert [unit.places for unit in coupling.units[:4]] == [
        tuple(("attention", 3 * h + d) for d in range(3)) for h in range(4)
    ]
    expected = masked(model, coupling, [0, 2])
    cut(model, coupling, [0, 2], x)
    assert model.attention.num_heads == 2 and model.attention.in_proj_weight.shape == (3 * 2 * 3, 12)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.train()(x), expected.train()(x), rtol=0, atol=1e-12)
    again = cut(model, couple(model, x), [0], x)
    assert model.attention.num_heads == 1
    assert again.attributes["attention", "num_heads"].tolist() == [0]


def test_a_width_computed_from_the_stream_freezes_the_heads_and_is_named():
    class Baked(Attention):
        def heads(self, x):
            n, t, c = x.shape
            return self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)

    attention = Baked()
    attention.num_heads, attention.qkv, attention.proj = 2, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
    coupling = couple(net(attention), TOKENS)
    assert "2.qkv" not in coupling.layers
    [cause] = [entry for entry in coupling.frozen if entry.axis == ("2.qkv.weight", 0) and entry.module == "2"][:1]
    assert "test_coupling_attention.py:" in cause.line
    assert cause.line in coupling.report()
