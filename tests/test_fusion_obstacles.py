"""What keeps a fused chain from running as one operation: hooks, other modules, patched functions, strange tensors."""

import copy
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import taylorkern as tk
from tests.cases import normal
from tests.fused import Plain, Summed, Written, X, needs_kernels, pair, same, sequential, spelled
from tests.fused import ran as ran

pytestmark = needs_kernels


def test_one_value_per_channel_is_refused_as_torch_does():
    model = tk.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), fuse=True)
    for shape, text in (((1, 3, 1, 1), "more than 1 value per channel"), ((2, 3), "4D")):
        with pytest.raises(ValueError, match=text):
            model(torch.ones(shape))


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_either_see_what_they_saw(kind, which, ran):
    fused = tk.convert(sequential(), fuse=True)
    seen = []
    handle = getattr(fused[which], kind)(lambda *given: seen.append(given))
    fused(X).sum().backward()
    assert len(seen) == 1 and not ran
    handle.remove()
    fused(X)
    assert ran == {"act": 1}


def test_global_hooks_see_every_module(ran):
    fused = tk.convert(sequential(), fuse=True)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    fused(X)
    handle.remove()
    assert seen == [*fused, fused] and not ran


class Statements(Written):
    def forward(self, x):
        y = self.bn(x)
        y = self.skip(y)
        y += 2 * x
        return self.relu(y)


@pytest.mark.parametrize("other", [nn.Identity(), nn.GELU(), nn.ELU()])
@pytest.mark.parametrize("kind", [Plain, Statements])
def test_a_module_replaced_later_is_what_runs(kind, other, ran):
    plain, fused = pair(kind)
    plain.relu = fused.relu = other
    same(plain, fused, X.double())
    assert not ran
    plain, fused = pair(kind)
    plain.bn = fused.bn = other
    same(plain, fused, X.double())
    plain, fused = pair(kind)
    plain.skip = fused.skip = other
    same(plain, fused, X.double())


def test_an_instance_forward_put_on_a_layer_later_is_what_runs(ran):
    fused = tk.convert(sequential(), fuse=True)
    fused[2].forward = lambda x: 0 * x
    assert fused(X).isfinite().all() and not ran
    assert torch.equal(fused(X)[:, :, 0, 0], fused[3].bias.expand(2, 2))


class Other(TorchFunctionMode):
    """Sees every function, and puts another in the place of one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.relu:
            return F.gelu(args[0])
        return func(*args, **(kwargs or {}))


def test_a_mode_that_follows_functions_sees_them(ran):
    for kind in (Plain, Summed, sequential):
        plain, fused = pair(kind)
        with Other():
            same(plain, fused, X.double())
    assert not ran
    with torch.device("cpu"):
        same(*pair(Plain), X.double())
    assert ran == {"act": 1}


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (nn.ReLU, "forward", lambda self, x: F.gelu(x)),
        (F, "relu", lambda x, inplace=False: F.gelu(x)),
        (F, "batch_norm", lambda x, *_, **__: 2 * x),
        (nn.Module, "__call__", lambda self, *x: 2 * self.forward(*x)),
    ],
)
def test_a_function_replaced_everywhere_is_what_runs(owner, name, other, ran, monkeypatch):
    models = [pair(kind) for kind in (Plain, sequential)]
    monkeypatch.setattr(owner, name, other)
    for plain, fused in models:
        same(plain, fused, X.double())
    assert not ran


def test_a_sequential_that_is_called_in_its_own_way_is_called(ran):
    class Doubled(nn.Sequential):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Tailed(nn.Module):
        def __init__(self):
            super().__init__()
            self.tail = Doubled(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            return F.relu(self.tail(x))

    same(*pair(Tailed), X.double())
    assert not ran


def test_weights_of_another_class_see_the_functions_they_go_through(ran):
    seen = []

    class Seeing(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    _, fused = pair(Plain)
    del fused.bn.weight
    fused.bn.weight = torch.ones(3, dtype=torch.float64).as_subclass(Seeing)
    assert type(fused(X.double())) is Seeing and F.batch_norm in seen and not ran


def transposed(self, x):
    return F.relu(self.bn(x.transpose(2, 3))).view(len(x), -1)


def first_operand_transposed(self, x):
    return F.relu(x.transpose(2, 3) + self.bn(x)).transpose(2, 3).view(len(x), -1)


def first_operand_channels_last(self, x):
    return F.relu(x.to(memory_format=torch.channels_last) + self.bn(x)).permute(0, 2, 3, 1).view(len(x), -1)


def second_operand_channels_last(self, x):
    return F.relu(self.bn(x) + x.to(memory_format=torch.channels_last)).view(len(x), -1)


def expanded(self, x):
    return F.relu(self.bn(x) + x.mean((2, 3), keepdim=True).expand_as(x)).view(len(x), -1)


@pytest.mark.parametrize(
    "forward",
    [transposed, first_operand_transposed, first_operand_channels_last, second_operand_channels_last, expanded],
)
def test_strides_are_the_unfused_ones(forward):
    same(*pair(spelled(forward)), X.double())


def test_strides_of_other_dimensions_are_the_unfused_ones():
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).double()
    fused = tk.convert(copy.deepcopy(plain), fuse=True)
    x = normal((2, 5, 3), 1, torch.float64).transpose(1, 2)
    assert fused(x).stride() == plain(x).stride()


def switched_off_in_between(self, x):
    y = self.bn(x)
    if not self.on:
        y = F.relu(y)
    torch.set_grad_enabled(False)
    z = y.mean()
    torch.set_grad_enabled(True)
    return y * z


def switched_off_for_the_sum(self, x):
    y = self.bn(x)
    torch.set_grad_enabled(False)
    y = y + x
    torch.set_grad_enabled(True)
    y = F.relu(y)
    return y + x


def switched_off_for_the_activation(self, x):
    y = self.bn(x)
    torch.set_grad_enabled(False)
    y = F.relu(y)
    torch.set_grad_enabled(True)
    return y + x


@pytest.mark.parametrize(
    "forward", [switched_off_in_between, switched_off_for_the_sum, switched_off_for_the_activation]
)
def test_gradients_are_recorded_where_they_were(forward):
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, True)
        same(*pair(spelled(forward)), X.double())


class Meddling(Written):
    def forward(self, x):
        x = 1 * x
        y = self.bn(x)
        x.mul_(2)
        return self.relu(y)


def test_an_input_changed_in_between_is_refused():
    fused = tk.convert(Meddling(), fuse=True)
    with pytest.raises(tk.InplaceError, match="the input of a fused BatchNorm2d was modified in place"):
        fused(X)


def addend_cleared(self, x):
    z = 2 * x
    y = self.bn(x)
    y += z
    z.zero_()
    return self.relu(y)


def addend_added_to(self, x):
    z = 2 * x
    y = self.bn(x) + z
    z += 1
    y = self.relu(y)
    return y + z


def addend_written_to(self, x):
    z = 2 * x
    y = self.bn(x)
    y = y + z
    z[0] = 1
    y = self.relu(y)
    return y + z


def addend_changed_in_the_call(self, x):
    z = 2 * x
    y = self.bn(x)
    y = y + z
    return torch.add(z.mul_(2), self.relu(y))


@pytest.mark.parametrize("forward", [addend_cleared, addend_added_to, addend_written_to, addend_changed_in_the_call])
def test_an_addend_changed_afterwards_is_added_as_it_was(forward):
    same(*pair(spelled(forward)), X.double())


def input_changed(self, x):
    x = 1 * x
    y = F.relu(self.bn(x))
    x += 1
    return y + x


def output_changed(self, x):
    y = F.relu(self.bn(x) + x)
    y += 1
    return y


@pytest.mark.parametrize("forward", [output_changed, input_changed])
def test_in_place_changes_afterwards_are_refused_where_torch_refuses_them(forward):
    for model in pair(spelled(forward)):
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            model(X.double()).sum().backward()


def output_of_relu6_changed(self, x):
    y = F.relu6(self.bn(x) + x)
    y += 1
    return y


def test_an_output_changed_afterwards_is_taken_where_torch_takes_it(ran):
    same(*pair(spelled(output_of_relu6_changed)), X.double())
    assert ran == {"add": 1}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Plain, Summed])
def test_what_is_not_finite_stays_so(kind, training, bad, ran):
    plain, fused = pair(kind)
    x = X.double().clone()
    x[0, 0, 0, 0] = bad
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((plain, fused), leaves, strict=True):
        model.train(training)(leaf).sum().backward()
    torch.testing.assert_close(fused(x), plain(x), equal_nan=True)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, equal_nan=True)
    torch.testing.assert_close(fused.bn.weight.grad, plain.bn.weight.grad, equal_nan=True)
    assert sum(ran.values()) == 2
