"""Fused models under what torch puts around models: compilation, tracing, checkpoints, transforms, autocast."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import taylorkern as tk
from tests.cases import distance, normal
from tests.fused import Bottleneck, needs_kernels, pair, state, step
from tests.fused import caller as caller
from tests.fused import ran as ran
from tests.networks import randomised

pytestmark = [needs_kernels, pytest.mark.usefixtures("caller")]


def test_compiled_in_one_graph(ran):
    plain, fused = pair(Bottleneck)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = normal((2, 4, 6, 6), 1, torch.float64)
    assert distance(compiled(x), plain(x)) < 1e-12 and not ran


def test_checkpointing_and_transforms(ran):
    plain, fused = pair(Bottleneck)
    x = normal((2, 4, 6, 6), 1, torch.float64).requires_grad_()
    for reentrant in (True, False):
        for model in (plain, fused):
            model.zero_grad()
            checkpoint(model, x, use_reentrant=reentrant).sin().sum().backward()
        assert distance(state(fused)[0], state(plain)[0]) < 1e-9
    ran.clear()
    parameters = dict(fused.eval().named_parameters())
    loss = lambda p: torch.func.functional_call(fused, p, x).sum()  # noqa: E731
    assert torch.func.grad(loss)(parameters).keys() == parameters.keys() and not ran
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(m.eval()(forward_ad.make_dual(x, x.detach()))).tangent for m in (plain, fused)
        ]
    assert distance(tangents[1], tangents[0]) < 1e-12 and not ran


def test_mixed_dtypes_and_autocast(ran):
    plain = randomised(Bottleneck())
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    wide, x = copy.deepcopy(plain).double(), normal((4, 4, 9, 9), 1)
    want = step(wide, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [step(model, x) for model in (plain, fused)]
    assert sum(ran.values()) >= 2
    assert distance(outputs[1], want) <= 2 * distance(outputs[0], want) + 1e-6
    assert distance(state(fused)[0], state(wide)[0]) <= 2 * distance(state(plain)[0], state(wide)[0]) + 1e-6


def test_buffers_of_a_functional_call_move_and_the_models_own_do_not(ran):
    results = []
    for model in pair(Bottleneck):
        weights = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        own = [b.clone() for b in model.buffers()]
        x = normal((2, 4, 6, 6), 1, torch.float64)
        torch.func.functional_call(model, (weights, buffers), (x,)).sin().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(own, model.buffers(), strict=True))
        values = [*(p.grad for p in weights.values()), *buffers.values()]
        results.append(torch.cat([v.double().flatten() for v in values]))
    assert distance(results[1], results[0]) < 1e-9 and sum(ran.values()) == 3


def test_checkpointing_that_selects(ran):
    def keep(ctx, op, *args, **kwargs):
        save = op is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    plain, fused = pair(Bottleneck)
    x = normal((2, 4, 6, 6), 1, torch.float64).requires_grad_()
    for model in (plain, fused):
        contexts = partial(create_selective_checkpoint_contexts, keep)
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).sin().sum().backward()
    for want, got in zip(state(plain), state(fused), strict=True):
        assert distance(got, want) < 1e-9


def test_a_trace_is_the_plain_networks(ran):
    plain, fused = pair(Bottleneck)
    x = normal((2, 4, 6, 6), 1, torch.float64)
    traced = torch.jit.trace(fused.eval(), x)
    assert distance(traced(2 * x), plain.eval()(2 * x)) < 1e-12 and not ran


def test_parts_of_gradients_several_losses_and_a_graph_that_is_gone(ran):
    results = []
    for model in pair(Bottleneck):
        x = normal((2, 4, 6, 6), 1, torch.float64).requires_grad_()
        out = model(x)
        loss, other = out.sin().sum(), out.cos().sum()
        parts = torch.autograd.grad(loss, [x, model.bn1.weight, model.bn3.bias], retain_graph=True)
        other.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()
        results.append(torch.cat([t.flatten() for t in (*parts, x.grad, *(p.grad for p in model.parameters()))]))
    assert distance(results[1], results[0]) < 1e-9 and sum(ran.values()) == 3


def test_nothing_that_requires_a_gradient(ran):
    plain, fused = pair(Bottleneck)
    x = normal((2, 4, 6, 6), 1, torch.float64)
    fused.requires_grad_(False)
    output = fused(x)
    assert not output.requires_grad and distance(output, plain(x)) < 1e-12


def test_saved_tensors_kept_elsewhere_and_gradients_looked_at_on_the_way(ran):
    plain, fused = pair(lambda: nn.Sequential(Bottleneck(), Bottleneck()))
    results = []
    for model in (plain, fused):
        with save_on_cpu():
            y = model[0](normal((2, 4, 6, 6), 1, torch.float64))
            y.retain_grad()
            y.register_hook(lambda g: 2 * g)
            model[1](y).sin().sum().backward()
        results.append(torch.cat([y.grad.flatten(), state(model)[0]]))
    assert distance(results[1], results[0]) < 1e-9 and sum(ran.values()) == 6
