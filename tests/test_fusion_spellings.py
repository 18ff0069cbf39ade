"""Fusion of each spelling, and of none that must run as it is written."""

import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from tests.cases import normal
from tests.fused import needs_kernels, pair, same, sequential, spelled
from tests.fused import ran as ran

pytestmark = needs_kernels


SPELLINGS = {}


def spelling(forward, act, add):
    SPELLINGS[forward.__name__] = (spelled(forward), act, add)


def module(self, x):
    return self.relu(self.bn(x))


def functional(self, x):
    return F.relu(self.bn(x))


def functional_in_place(self, x):
    y = F.relu(self.bn(x), inplace=True)
    return torch.relu(self.other(y)) + torch.relu_(self.tail(y))


def methods(self, x):
    return self.bn(x).relu() + self.other(x).relu_() + (self.tail(x) + x).relu()


def sums(self, x):
    return self.relu(self.bn(x) + x) + F.relu(2 * x + self.other(x)) + F.relu(self.tail(x) + self.bn(x))


def statements(self, x):
    y = self.bn(x)
    z = x * 2
    y = self.skip(y)
    y += z
    y = self.relu(y)
    y = self.other(y)
    y = z + y
    return self.relu(y)


def bare_in_place(self, x):
    y = self.bn(x)
    y.relu_()
    z = self.other(x)
    F.relu(z, inplace=True)
    return y * z


def renamed(self, x):
    normed = self.bn(x)
    summed = normed + x
    active = self.relu(summed)
    return (active, self.relu(self.other(x)))[0] + active


def interleaved(self, x):
    a = self.bn(x)
    b = self.other(x)
    a = F.relu(a)
    b = F.relu(b)
    return a - b


def sum_in_return(self, x):
    y = self.bn(x)
    return self.relu(y + x).mean((2, 3))


def sequential_tail(self, x):
    y = self.tail(x)
    return F.relu(y + x)


def conditional_activation(self, x):
    y = self.bn(x)
    if self.on:
        y = self.relu(y)
    return y


def conditional_return(self, x):
    y = self.bn(x)
    if self.on:
        return self.relu(y)
    return y


def conditional_start(self, x):
    if self.on:
        y = self.bn(x) + x
    else:
        x = 2 * x
        y = x + self.other(x)
    return self.relu(y)


def local_callable(self, x):
    for norm in self.norms:
        x = norm(x)
        x = F.relu(x)
    bn = self.bn
    return F.relu(bn(x))


def shared(self, x):
    return F.relu(self.bn(x) + self.bn(3 * x + 1))


def shared_in_statements(self, x):
    y = self.bn(x)
    z = F.relu(self.bn(2 * x + 5))
    y = F.relu(y)
    return y - z


def used_twice(self, x):
    y = self.bn(x)
    return F.relu(y) - y


def used_after(self, x):
    y = self.bn(x)
    z = F.relu(y)
    return z * y


def captured(self, x):
    y = self.bn(x)
    late = lambda: y * 2  # noqa: E731
    z = F.relu(y)
    return z + late()


def captured_before(self, x):
    late = lambda: y * 2  # noqa: E731
    y = self.bn(x)
    z = F.relu(y)
    return z + late()


def left_by_a_break(self, x):
    for _ in range(2):
        y = self.bn(x)
        if self.on:
            break
        y = F.relu(y)
    return y * 2


def activation_not_come_to(self, x):
    y = self.bn(x)
    if not self.on:
        y = self.relu(y)
        y = y * 2
    return y * 3


def activation_or_something_else(self, x):
    y = self.bn(x)
    if not self.on:
        return self.relu(y)
    else:
        z = y + x
        x = z * 2
    return x


def needed_in_the_next_round(self, x):
    y = x
    for _ in range(2):
        x = x + y
        y = self.bn(x)
        z = F.relu(y)
    return z


def broadcast(self, x):
    return F.relu(self.bn(x) + x.mean((2, 3), keepdim=True))


def other_dtype(self, x):
    return F.relu(self.bn(x) + x.float())


def summed_twice(self, x):
    y = self.bn(x)
    y += x
    y = y + 2 * x
    return self.relu(y)


def gradientless(self, x):
    with torch.no_grad():
        y = F.relu(self.bn(x))
    return self.tail(x) + y


def guarded(self, x):
    try:
        return F.relu(self.bn(x))
    finally:
        self.on = True


def behind_a_condition(self, x):
    y = self.bn(x)
    return F.relu(y) if self.scale > 1 else self.tail(x)


def another_activation(self, x):
    return F.gelu(self.bn(x))


def positional_option(self, x):
    return F.relu(self.bn(x), True)


def in_place_by_the_module(self, x):
    y = self.bn(x)
    self.relu(y)
    return y


def in_place_by_a_variable(self, x):
    y = self.bn(x)
    F.relu(y, inplace=self.on)
    return y


def not_in_place_after_all(self, x):
    y = self.bn(x)
    F.relu(y, inplace=False)
    z = self.other(x)
    z.relu()
    return y + z


relu_ = F.relu


def not_in_place_by_its_name(self, x):
    y = self.bn(x)
    relu_(y)
    return y


def another_tensor_in_place(self, x):
    y = self.bn(x)
    F.relu(y + x, inplace=True)
    return y


def another_tensor_by_method(self, x):
    y = self.bn(x)
    (y + x).relu_()
    return y


def held_elsewhere(self, x):
    y = held = self.bn(x)
    y = F.relu(y, inplace=True)
    z = self.other(x)
    self.on = [z]
    z = F.relu(z, inplace=True)
    return y + held + z + self.on[0]


def key_of_a_dictionary(self, x):
    outputs = {}
    y = self.bn(x)
    outputs[y] = F.relu(y)
    ((z, output),) = outputs.items()
    return output + z


def index_of_the_target(self, x):
    z = torch.zeros(1000, dtype=x.dtype)
    y = self.bn(x)
    z[y.argmax()] = F.relu(y).sum()
    return z


def needed_by_its_own_start(self, x):
    y = x
    for _ in range(2):
        y = self.bn(y)
        z = F.relu(y)
    return z


def needed_before_in_the_next_round(self, x):
    y = x
    for _ in range(2):
        if self.on:
            z = 2 * y
            y = self.bn(z)
        z = F.relu(y)
    return z


def renamed_and_needed_in_the_next_round(self, x):
    z = x
    for _ in range(2):
        y = self.bn(x)
        before = z + 1
        z = y + x
        active = F.relu(z)
    return active + before


def unbound_where_it_is_not_read(self, x):
    if not self.on:
        y = self.bn(x)
    if not self.on:
        y = F.relu(y)
        x = x + y
    return x


def left_by_an_exception(self, x):
    with suppress(ValueError):
        y = self.bn(x)
        z = int("none")
        y = F.relu(y + z)
    return 2 * y


def within_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        y = self.bn(x)
        y = F.relu(y)
    return y


def input_as_residual(self, x):
    y = self.bn(x)
    y += x
    return self.relu(y)


def sum_into_the_other(self, x):
    y = 1 * x
    y += self.bn(x)
    return F.relu(y)


def numbers(self, x):
    return F.relu(self.bn(x) + 1) + F.relu(2.5 + self.other(x)) + F.relu(self.tail(x) + torch.tensor(3.0))


def chains_within_a_sum(self, x):
    return F.relu(self.bn(x) + F.relu(self.other(x) + F.relu(self.tail(x))))


def walrus(self, x):
    return F.relu(self.bn(x := 2 * x)) + x


def comprehension(self, x):
    return sum([F.relu(norm(x)) for norm in self.norms])


def function_within(self, x):
    late = lambda t: self.relu(self.bn(t))  # noqa: E731
    return late(x)


def by_keyword(self, x):
    return F.relu(input=self.bn(x)) + F.relu(self.other(input=x))


def matched(self, x):
    y = self.bn(x)
    match self.on:
        case True:
            y = F.relu(y)
    return y


for _forward, _act, _add in [
    (module, 1, 0),
    (functional, 1, 0),
    (functional_in_place, 3, 0),
    (methods, 2, 1),
    (sums, 0, 3),
    (statements, 0, 2),
    (bare_in_place, 2, 0),
    (renamed, 1, 1),
    (interleaved, 2, 0),
    (sum_in_return, 0, 1),
    (sequential_tail, 0, 1),
    (conditional_activation, 1, 0),
    (conditional_return, 1, 0),
    (conditional_start, 0, 1),
    (local_callable, 2, 0),
    (shared, 0, 0),
    (shared_in_statements, 1, 0),
    (used_twice, 0, 0),
    (used_after, 0, 0),
    (captured, 0, 0),
    (captured_before, 0, 0),
    (left_by_a_break, 0, 0),
    (activation_not_come_to, 0, 0),
    (activation_or_something_else, 0, 0),
    (needed_in_the_next_round, 0, 0),
    (broadcast, 0, 0),
    (other_dtype, 0, 0),
    (summed_twice, 0, 0),
    (gradientless, 0, 0),
    (guarded, 0, 0),
    (behind_a_condition, 0, 0),
    (another_activation, 0, 0),
    (positional_option, 1, 0),
    (in_place_by_the_module, 1, 0),
    (in_place_by_a_variable, 1, 0),
    (not_in_place_after_all, 0, 0),
    (not_in_place_by_its_name, 0, 0),
    (another_tensor_in_place, 0, 0),
    (another_tensor_by_method, 0, 0),
    (held_elsewhere, 0, 0),
    (key_of_a_dictionary, 0, 0),
    (index_of_the_target, 0, 0),
    (needed_by_its_own_start, 0, 0),
    (needed_before_in_the_next_round, 0, 0),
    (renamed_and_needed_in_the_next_round, 0, 0),
    (unbound_where_it_is_not_read, 0, 0),
    (left_by_an_exception, 0, 0),
    (within_autocast, 1, 0),
    (input_as_residual, 0, 1),
    (sum_into_the_other, 0, 0),
    (numbers, 0, 0),
    (chains_within_a_sum, 1, 2),
    (walrus, 1, 0),
    (comprehension, 0, 0),
    (function_within, 0, 0),
    (by_keyword, 0, 0),
    (matched, 0, 0),
]:
    spelling(_forward, _act, _add)


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling(name, ran):
    kind, act, add = SPELLINGS[name]
    plain, fused = pair(kind)
    for seed in range(2):
        same(plain, fused, normal((2, 3, 5, 5), seed, torch.float64))
    assert (ran["act"], ran["add"]) == (2 * act, 2 * add)


@pytest.mark.parametrize("name", SPELLINGS)
def test_evaluation_without_gradients_is_bit_for_bit_the_plain_networks(name, ran):
    plain, fused = pair(SPELLINGS[name][0])
    x = normal((2, 3, 5, 5), 1, torch.float64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), fused.eval()(x))
    assert not ran


def test_sequentials_fuse_through_identities_and_into_each_other(ran):
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.ReLU(), nn.BatchNorm2d(4))
    twice = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), nn.ReLU())
    for plain in (sequential(), sequential(nn.Identity()), nested, twice):
        ran.clear()
        same(plain.double(), tk.convert(copy.deepcopy(plain), fuse=True), normal((2, 3, 5, 5), 1, torch.float64))
        assert ran == {"act": 1}
