"""Scores with a Gram matrix, reduced over processes."""

import pytest
import torch
from torch import multiprocessing

from taylorkern.gram import FORMS
from tests.grams import made, step
from tests.networks import plain, residual


def refused_reduction(model, scores, why, curved=False):
    """The states before and after."""
    step(model, 1, scores=scores if curved else None)
    before = scores.state_dict()
    with pytest.raises(ValueError, match=why):
        scores.all_reduce()
    return before, scores.state_dict()


def reduced(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for form in FORMS:
        model, scores = made(form=form, gram_rows=9, seed=rank)
        for seed in range(2 + rank):
            step(model, 10 * rank + seed)
        own = scores.state_dict()
        scores.all_reduce()
        found[form] = own, scores.state_dict()
    refused = [
        refused_reduction(*made(plain if rank else lambda: residual(3)), "another model"),
        refused_reduction(*made(), "rows of two kinds", curved=rank == 1),
    ]
    torch.save((found, refused), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_process_ends_with_the_same_bits(tmp_path):
    multiprocessing.spawn(reduced, (str(tmp_path),), nprocs=2)
    (first, first_refused), (second, second_refused) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    for form in FORMS:
        _, scores = made(form=form, gram_rows=9, seed=5)
        scores.load_state_dict(first[form][0])
        scores.merge(second[form][0])
        want = scores.state_dict()
        assert want["minibatches"] == 5 and not same(want, first[form][0])
        assert same(first[form][1], want) and same(second[form][1], want)
    assert all(same(before, after) for before, after in (*first_refused, *second_refused))


def test_no_process_group_no_reduction():
    model, scores = made()
    step(model, 1)
    with pytest.raises(RuntimeError, match="init_process_group"):
        scores.all_reduce()
    assert scores.minibatches == 1
