"""Normalisations that run in C++ on a GPU, against the same kernels called from Python."""

import pytest
import torch

import taylorkern as tk
from taylorkern import backends, direct, layers
from taylorkern.backends import cuda
from tests.cases import LAYOUTS, normal
from tests.devices import needs_gpu

SHAPE = (5, 37, 9, 7)


def case(dtype, layout, residual):
    x = normal(SHAPE, 1, dtype, layout).cuda().requires_grad_()
    add = normal(SHAPE, 2, dtype, layout).cuda().requires_grad_() if residual else None
    layer = tk.BatchNorm2d(SHAPE[1]).cuda()
    with torch.no_grad():
        layer.weight.copy_(normal(SHAPE[1:2], 3))
        layer.bias.copy_(normal(SHAPE[1:2], 4))
    return layer, x, add, torch.ones(SHAPE[:2], device="cuda").requires_grad_()


def results(run, of, layout, activation):
    layer, x, add, z = of
    y = run(layer, x, add, z, activation, 0.1)
    assert y is not None
    dy = normal(SHAPE, 5, x.dtype, layout).cuda()
    leaves = [x, layer.weight, layer.bias, z, *([] if add is None else [add])]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), layer.running_mean.clone(), layer.running_var.clone()]


@needs_gpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_and_python_agree_to_the_bit(dtype, layout, residual, monkeypatch):
    of = case(dtype, layout, residual)
    if not isinstance(backends.provider("batch_norm_act", of[1]), cuda.Kernels):
        pytest.fail(f"CUDA C++ doesn't serve here: {cuda.status().reason}")
    monkeypatch.setattr(backends, "PROVIDERS", backends.PROVIDERS | {"cuda": (cuda.streamed, backends.reference)})
    for activation in ("relu", "relu6"):
        with torch.cuda.stream(torch.cuda.Stream()):
            by_library = results(direct.fused, case(dtype, layout, residual), layout, activation)
        by_python = results(layers._fused_in_python, case(dtype, layout, residual), layout, activation)
        torch.cuda.synchronize()
        for got, want in zip(by_library, by_python, strict=True):
            assert torch.equal(got, want) and got.stride() == want.stride()
