"""The reservoir: a uniform sample of rows, seeded, merged, and what is estimated by it."""

import pytest
import torch

from taylorkern.coupling import Unit
from taylorkern.gram import Reservoir
from tests.cases import normal
from tests.grams import batch, made, step, whole


def numbered(start, number):
    return torch.arange(start, start + number, dtype=torch.float64).unsqueeze(1)


def sampled(seed, *numbers, capacity=6):
    """The rows in a reservoir after pieces of ``numbers`` rows, each row its own number."""
    reservoir = Reservoir([Unit((("a", 0),))], capacity, seed)
    for i, number in enumerate(numbers):
        reservoir.add([numbered(sum(numbers[:i]), number)], 1, "fisher")
    return reservoir


def merged(seed):
    """20 rows in two reservoirs, of 13 and of 7."""
    first, second = sampled(seed, 9, 4), Reservoir([Unit((("a", 0),))], 6, seed + 10**6)
    second.add([numbered(13, 7)], 1, "fisher")
    first.merge(second.state_dict())
    return first


@pytest.mark.parametrize("sample", [lambda seed: sampled(seed, 4, 1, 15), merged], ids=["algorithm R", "merged"])
def test_every_row_has_the_same_chance_of_a_place(sample):
    """6 of 20 rows, 1000 times: each row, and each pair, within 5 standard deviations."""
    times, rows = 1000, torch.zeros(1000, 20, dtype=torch.float64)
    for seed in range(times):
        found = sample(seed).state_dict()
        assert found["seen"] == 20 and len(found["rows"].unique()) == 6
        rows[seed, found["rows"].flatten().long()] = 1
    for got, chance in ((rows.mean(0), 6 / 20), ((rows.T @ rows / times)[torch.ones(20, 20).triu(1) > 0], 30 / 380)):
        assert float((got - chance).abs().max()) < 5 * (chance * (1 - chance) / times) ** 0.5


def test_a_reservoir_estimates_the_full_matrix_without_bias():
    units, rows, estimates = [Unit((("a", c),)) for c in range(5)], normal((28, 5), 1, torch.float64), []
    want = rows.T @ rows / 4
    for seed in range(300):
        reservoir = Reservoir(units, 10, seed)
        reservoir.add(rows.split((7, 1, 20)), 1, "fisher")
        [block] = reservoir.blocks(units, "full", 4)
        estimates.append(block.matrix)
    drawn = torch.stack(estimates)
    assert bool(((drawn.mean(0) - want).abs() <= 5.5 * drawn.std(0) / 300**0.5).all())


def test_a_reservoir_is_seeded():
    def rows(seed):
        model, scores = made(form="reservoir", gram_rows=4, seed=seed)
        for _ in range(2):
            scores.reset()
            for batch_seed in range(3):
                step(model, batch_seed)
            yield whole(scores)

    (first, after_a_reset), (again, _), (other, _) = rows(1), rows(1), rows(2)
    assert torch.equal(first, after_a_reset) and torch.equal(first, again) and not torch.equal(first, other)


def test_a_reservoir_is_read_whole_only_where_that_fits_the_budget():
    model, scores = made(form="reservoir", gram_rows=5, gram_budget=8 * 300)
    step(model, 1)
    units = len(scores.units)
    assert units**2 > 300 and len(scores.gram()) > 1 and len(scores.gram("full")) == 1


def test_a_minibatch_without_samples_is_one_of_nought():
    model, scores = made(form="reservoir")
    model(batch(0, 1)[0][:0]).sum().backward()
    assert scores.minibatches == 1 and not whole(scores).any()
