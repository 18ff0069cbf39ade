"""Fusion of methods written at random: as the unfused ones, up to what a rounding of the input changes."""

import copy
import importlib.util
import warnings

import pytest
import torch

import taylorkern as tk
from tests.cases import normal
from tests.fused import needs_kernels
from tests.fused import ran as ran
from tests.networks import randomised
from tests.programs import program

pytestmark = needs_kernels

SEEDS = range(12)
PROGRAMS = 10  # a seed


def network(seed, folder):
    file = folder / f"program_{seed}.py"
    file.write_text(program(seed))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    return randomised(module.Net()).double()


def stepped(model, x):
    """Everything a step makes; None where torch refuses the backward, for a tensor that it needs was overwritten."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    try:
        (y + 0 * leaf).sin().sum().backward()
    except RuntimeError as error:
        assert "inplace operation" in str(error) or "in place" in str(error)
        return None
    gradients = [torch.zeros(1) if t.grad is None else t.grad for t in (leaf, *model.parameters())]
    return [y.detach(), *gradients, *(b.double() for b in model.buffers()), torch.tensor(y.stride())]


def far(one, other):
    return [float((a - b).abs().max()) if a.shape == b.shape else torch.inf for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_programs(seed, tmp_path, ran):
    x = normal((2, 3, 3, 3), 1, torch.float64)
    compared = 0
    for number in range(PROGRAMS):
        plain = network(PROGRAMS * seed + number, tmp_path)
        fused, shaken = copy.deepcopy(plain), copy.deepcopy(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tk.convert(fused, fuse=True)
        want = stepped(plain, x)
        if want is None:
            continue
        got, rounded = stepped(fused, x), stepped(shaken, x * (1 + 1e-14))
        assert got is not None
        for error, allowed, value in zip(far(got, want), far(rounded, want), want, strict=True):
            assert error <= 1e-9 * (1 + float(value.abs().max())) + 10 * allowed, program(PROGRAMS * seed + number)
        compared += 1
    assert compared > PROGRAMS / 3 and sum(ran.values()) > compared / 2
