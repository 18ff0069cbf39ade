"""Batch normalisation in C++ under hooks, modes, transforms and threads: as from Python, or left to Python."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import taylorkern as tk
from taylorkern import autograd
from taylorkern.layers import fused_batch_norm
from tests.callers import each, equal, needs_library, net, refusals, results, step
from tests.cases import normal
from tests.fused import X, called_from
from tests.networks import residual

pytestmark = needs_library


def test_a_step():
    each(step, 3)


def test_backward_twice():
    def again(model, x):
        loss = model(x).sin().sum()
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in model.parameters()]
        loss.backward()
        assert all(torch.equal(2 * g, p.grad) for g, p in zip(first, model.parameters(), strict=True))

    def gone(model, x):
        y = model.bn3(x)
        y.backward(x, retain_graph=True)
        y.backward(x)
        y.backward(x)

    each(again, 3)
    assert "a second time" in str(refusals(gone, 1))


@pytest.mark.parametrize("power", [1, 2])  # a gradient that is constant, and one that requires one itself
@pytest.mark.parametrize("fused", [True, False])
def test_second_derivatives_are_refused_and_first_ones_are_right(fused, power):
    def differentiate(model, x):
        x.requires_grad_()
        y = F.relu(model.bn1(x) + x) if not fused else fused_batch_norm(model.bn1, model.bn1.gate, x, x, "relu")
        (gradient,) = torch.autograd.grad((y**power).sum(), x, create_graph=True)
        found.append(gradient.detach())
        gradient.square().sum().backward()

    found = []
    assert "once_differentiable" in str(refusals(differentiate, 1))
    equal(*([g] for g in found))
    assert found[0].count_nonzero()


@pytest.mark.parametrize("what", ["x", "weight"])
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_overwritten_before_backward(fused, what):
    def overwrite(model, x):
        layer = model.bn1
        y = fused_batch_norm(layer, layer.gate, x, x, "relu") if fused else layer(x)
        with torch.no_grad():
            (x if what == "x" else layer.weight).zero_()
        y.sum().backward()

    error = refusals(overwrite, 1)
    assert isinstance(error, tk.InplaceError) and "scored batch normalisation was overwritten" in str(error)


def test_an_output_and_a_residual_may_be_overwritten():
    def overwrite(model, x):
        layer, other = model.bn1, x.clone()
        y = fused_batch_norm(layer, layer.gate, x, other, "relu6")  # of which torch keeps no output
        y.mul_(2)
        other.zero_()
        y.sin().sum().backward()
        return y.detach()

    each(overwrite, 1)


def test_an_overwritten_output_of_a_relu_behind_an_addition_is_refused():
    def overwrite(model, x):
        y = fused_batch_norm(model.bn1, model.bn1.gate, x, x.clone(), "relu")
        y.mul_(2)
        with pytest.raises(tk.InplaceError, match="overwritten in place"):
            y.sin().sum().backward()
        return x.detach()

    each(overwrite, 1)


def test_a_sum_before_an_activation_that_no_mask_tells_is_refused():
    def smooth(model, x):
        with pytest.raises(ValueError, match=r"silu|mask"):
            fused_batch_norm(model.bn1, None, x, x.clone(), "silu").sum().backward()
        return x.detach()

    each(smooth, 0)


def tripled(parameter):
    parameter.grad *= 3


def test_hooks_on_tensors_and_nodes():
    def hooked(model, x):
        seen = []
        y = model.bn1(x.requires_grad_())
        y.retain_grad()
        y.register_hook(lambda g: 2 * g)
        y.grad_fn.register_hook(lambda inputs, outputs: seen.append((len(inputs), len(outputs))))
        y.grad_fn.register_prehook(lambda outputs: seen.append(len(outputs)))
        model.bn1.weight.register_post_accumulate_grad_hook(tripled)
        y.sin().sum().backward()
        assert seen[0] == 1 and len(seen) == 2
        return y.grad

    each(hooked, 1, X.clone())


@pytest.mark.parametrize("where", ["tensor", "node", "pack", "unpack"])
def test_an_error_in_a_hook_comes_out(where):
    class OwnError(Exception):
        pass

    def fail(*_):
        raise OwnError(where)

    def use(model, x):
        hooks = {"pack": (fail, lambda t: t), "unpack": (lambda t: t, fail)}.get(where)
        with saved_tensors_hooks(*hooks) if hooks else nullcontext():
            y = model.bn1(x)
        if where == "tensor":
            y.register_hook(fail)
        if where == "node":
            y.grad_fn.register_hook(fail)
        y.sum().backward()

    # What packs is called when the normalisation has run.
    assert isinstance(refusals(use, int(where != "pack")), OwnError)


def as_list(t):
    return t.tolist(), t.dtype


def from_list(packed):
    return torch.tensor(packed[0], dtype=packed[1])


# What is packed, and how it is unpacked: as it was, in another layout, in another dtype, strided
HOOKS = {
    "as it is": (lambda t: t, lambda t: t),
    "a list": (as_list, from_list),
    "channels last": (
        lambda t: t.contiguous(),
        lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    ),
    "only masks": (lambda t: t, lambda t: t.to(memory_format=torch.channels_last) if t.dtype is torch.bool else t),
    "strided": (lambda t: t, lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    "negated": (lambda t: t, lambda t: t if t.dtype is torch.bool else (-t)._neg_view()),
    "masks as floats": (lambda t: t.float(), lambda t: t),
    "masks as large floats": (lambda t: 255.0 * t if t.dtype is torch.bool else t, lambda t: t),
    "a parameter": (lambda t: t, lambda t: t if t.dtype is torch.bool else nn.Parameter(t)),
}


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("name", HOOKS)
def test_saved_tensors_come_back_as_hooks_give_them(name, activation):
    def use(model, x):
        with saved_tensors_hooks(*HOOKS[name]):
            y = model.bn1(x)
            z = fused_batch_norm(model.bn2, model.bn2.gate, y, x, activation)
            z.sin().sum().backward()
        return z.detach()

    for x in (X, X.to(memory_format=torch.channels_last)):
        each(use, 2, x)


def test_saved_tensors_that_a_hook_has_spoilt_are_refused():
    def use(model, x):
        with saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
            model.bn1(x).sum().backward()

    assert "shape" in str(refusals(use, 1))


def test_saving_on_the_cpu():
    def use(model, x):
        with save_on_cpu():
            return step(model, x)

    each(use, 3)


# Of the second forward's last call a checkpoint knows enough when that has run.
@pytest.mark.parametrize(("reentrant", "calls"), [(True, 3), (False, 5)])
def test_checkpoints_repeat_what_they_have_to(reentrant, calls):
    def use(model, x):
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.sin().sum().backward()
        return y.detach()

    buffers = each(use, calls)[-9:]
    assert [int(b) for b in buffers[2::3]] == [2, 2, 2]  # as torch's own


def test_anomaly_detection_names_the_forward():
    def use(model, x):
        with torch.autograd.detect_anomaly(check_nan=True):
            model.bn1(x).sum().mul(float("nan")).backward()

    with pytest.warns(UserWarning, match="Anomaly"):
        assert "nan" in str(refusals(use, 1))


def test_references_are_gone_with_the_graph():
    model = net()
    scores = tk.Scores(model, None)
    callables = autograd.gradients, autograd.overwritten
    step(model, X)
    before = [sys.getrefcount(c) for c in callables]
    for _ in range(3):
        x = X.clone().requires_grad_()
        y = model.bn1(x)
        z = fused_batch_norm(model.bn2, model.bn2.gate, y, x, "relu")
        held = [weakref.ref(t) for t in (x, y, z)]
        z.sum().backward()
        del x, y, z
        assert not any(ref() is not None for ref in held)
        x = X * 1
        held, y = weakref.ref(x), model.bn1(x)
        del x
        assert held() is not None
        del y  # without a backward
        assert held() is None
        with saved_tensors_hooks(*HOOKS["strided"]):  # by way of Python
            model.bn1(X).sum().backward()
    gc.collect()
    assert [sys.getrefcount(c) for c in callables] == before
    assert scores.minibatches == 7


def test_a_backward_frees_what_was_saved():
    model = net()
    scores = tk.Scores(model, None)
    x = X * 1
    held, y = weakref.ref(x), model.bn1(x)
    del x
    y.sum().backward()
    assert held() is None and y.grad_fn is not None and scores.minibatches == 1


def test_a_profiler_sees_the_operations():
    seen = []

    def use(model, x):
        with profile() as profiled:
            y = step(model, x)
        seen.append({e.key for e in profiled.key_averages() if "taylorkern" in e.key})
        return y

    each(use, 0)
    assert seen[0] == seen[1] >= {"taylorkern::batch_norm_act", "taylorkern::batch_norm_act_backward"}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("when", ["forward", "backward", "both"])
def test_a_dispatch_mode_sees_single_operations(when):
    seen = []

    def use(model, x):
        names = Names()
        with names if when != "backward" else nullcontext():
            y = model(x)
        with names if when != "forward" else nullcontext():
            y.sin().sum().backward()
        seen.append([name for name in names.seen if "norm" in name])
        return y.detach()

    each(use, 3 if when == "backward" else 0)
    assert seen[0] == seen[1] and seen[0]


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_function_mode():
    def use(model, x):
        with Functions():
            return step(model, x)

    each(use, 0)


def test_no_gradients_no_functions():
    for context in (torch.no_grad, torch.inference_mode):

        def use(model, x, context=context):
            with context():
                return model(x).clone()

        each(use, 0)


def test_inference_tensors_outside_of_inference():
    with torch.inference_mode():
        x = X.clone()

    def use(model, x):
        return model.bn1(x)

    refusals(lambda model, _: use(model, x), 0)


def test_fake_tensors():
    def use(model, x):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = model(mode.from_tensor(x))
            y.sum().backward()
        assert type(y) is FakeTensor and all(type(t) is FakeTensor for t in results(model)[:7])
        model.zero_grad()

    each(use, 0)


def test_transforms():
    model = net().eval()
    parameters = dict(model.named_parameters())
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).sin().sum()  # noqa: E731
    with called_from("C++") as counts:
        torch.func.grad(loss)(parameters, X)
        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X[:, None])
        torch.func.jvp(model, (X,), (X,))
        torch.func.vmap(model)(X[:, None])
    assert not counts.total()


def test_forward_derivatives():
    def tangent(model, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model.bn1(forward_ad.make_dual(x, x))).tangent.detach()

    def scored(model, x):
        with pytest.warns(UserWarning, match="not scored"):
            return tangent(model, x)

    assert torch.equal(each(scored, 0)[0], tangent(net(), X))


def test_a_trace_has_the_operations():
    model = net().eval()
    scores = tk.Scores(model, None)
    with called_from("C++") as counts:
        traced = torch.jit.trace(model, X, check_trace=False)
    assert not counts.total() and scores.dropped == 0
    assert torch.allclose(traced(2 * X), model(2 * X), atol=1e-5)


@pytest.mark.parametrize("way", ["model", "backward"])
def test_compilation(way):
    def use(model, x):
        torch._dynamo.reset()
        if way == "model":
            y = torch.compile(model, backend="eager")(x)
            y.sin().sum().backward()
        else:
            y = model(x)
            with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
                y.sin().sum().backward()
        return y.detach()

    each(use, 0 if way == "model" else 3)


def test_copies_and_pickles_after_a_step():
    model = net()
    scores = tk.Scores(model, None)
    step(model, X)
    want = copy.deepcopy(model.state_dict())
    for other in (copy.deepcopy(model), tk.convert(pickle.loads(pickle.dumps(model)), fuse=True)):
        assert all(torch.equal(want[name], t) for name, t in other.state_dict().items())
        with called_from("C++") as counts:
            step(other, X)
        assert counts["fused"] == 2
    assert scores.minibatches == 1


def test_a_backward_in_another_thread():
    def use(model, x):
        y = model(x)
        thread = threading.Thread(target=y.sin().sum().backward)
        thread.start()
        thread.join()
        return y.detach()

    each(use, 3)


def test_threads_that_share_a_model():
    model = tk.convert(residual(), fuse=True)
    model.eval()
    x = normal((4, 2, 8, 8), 1)
    want = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    wrong: list[Exception] = []

    def work():
        try:
            for _ in range(10):
                got = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
                equal(got, want)
        except Exception as error:
            wrong.append(error)

    with called_from("C++") as counts:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and counts["fused"] == 4 * 10 * 5


def test_threads_that_train_a_model():
    """As data parallelism does: gradients add up, and nobody waits for the interpreter's lock for ever."""
    model, done = net(), []
    threads = [threading.Thread(target=lambda: done.extend(step(model, X) for _ in range(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and len(done) == 40
    assert all(p.grad.isfinite().all() for p in model.parameters())
