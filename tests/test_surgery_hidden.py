"""Cuts that ordinary examples would hide the faults of, and what a verified cut leaves behind in a model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from taylorkern.coupling import couple
from taylorkern.surgery import SurgeryError, cut

DIM, HEADS, WIDTH = 6, 4, 3


class Attention(nn.Module):
    """``heads`` is a number of the code's own; ``scaled`` takes the scale from a division by the number of heads."""

    def __init__(self, heads=None, scaled=False, cast=None) -> None:
        super().__init__()
        self.num_heads, self.scaled, self.cast = HEADS, scaled, cast
        self.heads = (lambda: heads) if heads else (lambda: self.num_heads)
        self.qkv, self.proj = nn.Linear(DIM, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, DIM)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = (p.view(n, t, self.heads(), -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if self.scaled:
            weights = q @ k.transpose(-2, -1) * (c / self.heads()) ** -0.5
            x = weights.softmax(-1, dtype=self.cast).to(x.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def model(**options) -> nn.Module:
    return nn.Sequential(Attention(**options), nn.Linear(DIM, 5), nn.ReLU(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize("example", [torch.zeros(1, 4, DIM), torch.ones(1, 4, DIM), torch.randn(1, 4, DIM)])
@pytest.mark.parametrize("cast", [None, torch.float32])
def test_neither_constant_examples_nor_casts_hide_a_wrong_scale(example, cast):
    net, x = model(scaled=True, cast=cast), example.double()
    coupling = couple(net, x)
    head = int(coupling.layers["0.qkv"].max())
    with pytest.raises(SurgeryError, match="differ"):
        cut(net, coupling, [head], x)


def test_heads_counted_outside_of_attributes_stay_also_in_fused_attention():
    coupling = couple(model(heads=HEADS), torch.randn(1, 4, DIM, dtype=torch.float64))
    assert set(coupling.layers) == {"0.proj", "1"}


def test_averages_of_torchs_attention_are_cut_and_run():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(DIM, 3, batch_first=True), nn.Linear(DIM, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    net, x = Attending().double(), torch.randn(2, 4, DIM, dtype=torch.float64)
    average = AveragedModel(net)
    average.update_parameters(net)
    cut(net, couple(net, x), [1], x, copies=average)
    assert torch.equal(average(x), net(x))


class Caching(nn.Module):
    """Keeps what it has seen in plain attributes, and what it makes on its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 4), nn.Linear(4, 2)
        self.seen, self.by_length = [], {}

    def forward(self, x):
        if x.shape[1] not in self.by_length:
            self.by_length[x.shape[1]] = torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device)
        self.last = h = self.a(x) * self.by_length[x.shape[1]]
        self.seen.append(h)
        return self.b(h)


def test_plain_attributes_are_as_they_were():
    net, x = Caching(), torch.randn(2, 4, DIM)
    before = copy.copy(vars(net))
    coupling = couple(net, x)
    cut(net, coupling, [2], x)
    assert vars(net).keys() == before.keys()
    assert net.seen == [] and net.by_length == {}
    assert net(x).dtype == torch.float32


def test_layers_inside_of_vmap_are_cut():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(DIM, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.vmap(lambda row: self.a(row).relu())(x))

    net, x = Mapped().double(), torch.randn(3, DIM, dtype=torch.float64)
    coupling = couple(net, x)
    if coupling.units:
        expected = copy.deepcopy(net)
        with torch.no_grad():
            expected.b.weight[:, 1] = 0
        cut(net, coupling, [1], x)
        torch.testing.assert_close(net(x), expected(x), rtol=0, atol=1e-12)
    else:
        assert coupling.frozen
