"""What happens to values behind the tracer's back: results nobody uses freeze nothing, numbers that leave do."""

import pytest
import torch
from torch import Tensor, nn

from taylorkern.coupling import Coupling, couple
from taylorkern.surgery import cut

X = torch.randn(2, 5, 6, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * self.between(x))


def coupled(between) -> Coupling:
    return couple(Net(between).double(), X)


def unused(x: Tensor) -> float:
    x.mean(-1)
    return 1.0


def test_a_reduction_that_nobody_uses_freezes_nothing():
    assert len(coupled(unused).units) == 4


LEAVING = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "item": lambda x: x.max().item(),
    "tolist": lambda x: max(max(max(rows) for rows in samples) for samples in x.tolist()),
    "numpy": lambda x: float(x.detach().numpy().max()),
    "array": lambda x: float(x.__array__().max()),
    "reduced, then tolist": lambda x: max(x.amax((1, 2)).tolist()),
}


@pytest.mark.parametrize("case", LEAVING)
def test_numbers_made_of_channels_freeze_them_by_name(case):
    coupling = coupled(LEAVING[case])
    assert not coupling.units
    assert any("test_coupling_leaving.py:" in entry.line for entry in coupling.frozen)


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_torchs_attention_loses_heads_whose_weights_are_thrown_away(options):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 3, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, **options)[0])

    model = Attending().double()
    coupling = couple(model, X)
    assert [len(unit.places) for unit in coupling.units[:3]] == [2] * 3
    cut(model, coupling, [1], X)
    assert model.attention.num_heads == 2


def test_averaged_attention_weights_that_are_used_keep_the_heads():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 3, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            x, weights = self.attention(x, x, x)
            return self.head(x) + weights.sum()

    coupling = couple(Attending().double(), X)
    assert "attention" not in coupling.layers
    assert any(entry.operation == "aten.mean.dim" for entry in coupling.frozen)
