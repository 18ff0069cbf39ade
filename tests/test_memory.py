"""The peak of torch's allocations that the benches report."""

import torch
from torch import nn

from bench.memory import peak

FLOATS = 250_000
MEGABYTE = 4 * FLOATS


def test_a_known_sequence_has_its_known_peak():
    def call():
        a = torch.empty(FLOATS)  # 1 MB held
        b = torch.empty(4 * FLOATS)  # 5
        del a  # 4
        c = torch.empty(2 * FLOATS)  # 6
        del b, c  # 0
        return torch.empty(3 * FLOATS)  # 3

    assert peak(call) == 6 * MEGABYTE


def test_what_the_call_returns_and_what_only_passes_count_alike():
    assert peak(lambda: torch.empty(FLOATS)) == MEGABYTE
    assert peak(lambda: torch.empty(FLOATS).numel()) == MEGABYTE
    assert peak(lambda: None) == 0


def test_what_was_there_before_does_not_count():
    before = torch.zeros(10 * FLOATS)
    assert peak(lambda: before.zero_()) == 0
    assert peak(lambda: before[:FLOATS] + before[FLOATS : 2 * FLOATS]) == MEGABYTE


def test_memory_that_only_backward_takes_is_seen():
    x, layer = torch.ones(1000, 1000), nn.Linear(1000, 10, bias=False)

    def backward():
        layer(x).sum().backward()

    forward = peak(lambda: layer(x).sum())
    assert forward + layer.weight.nbytes <= peak(backward) < forward + x.nbytes
