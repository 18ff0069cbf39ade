"""A fused model's life: converted twice, copied, pickled, replicated, reverted."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylorkern as tk
from tests.cases import distance, normal
from tests.fused import Bottleneck, Plain, Written, X, build, needs_kernels, sequential
from tests.fused import ran as ran

pytestmark = needs_kernels


def keys(model):
    return [set(vars(m)) for m in model.modules()]


def test_state_names_and_repr_stay_and_revert_is_exact():
    plain = build("resnet18")
    before, text, state_keys = keys(plain), repr(plain), list(plain.state_dict())
    forwards = [m.forward for m in plain.modules()]
    fused = tk.convert(plain, fuse=True)
    assert repr(fused) == text and list(fused.state_dict()) == state_keys
    assert "forward" in vars(fused.layer1[0])
    tk.revert(fused)
    assert keys(fused) == before and [m.forward for m in fused.modules()] == forwards
    tk.convert(fused)
    assert "forward" not in vars(fused.layer1[0])


def test_a_converted_model_is_fused_by_a_second_call(ran):
    model = tk.convert(sequential())
    model(X)
    assert not ran
    tk.convert(model, fuse=True)
    tk.convert(model, fuse=True)
    model(X)
    assert ran["act"] == 1
    with pytest.raises(ValueError, match="converted already"):
        tk.convert(model)
    with pytest.raises(ValueError, match="no layer"):
        tk.convert(nn.ReLU(), fuse=True)


def test_copies_are_fused_and_apart(ran):
    fused = tk.convert(Bottleneck(), fuse=True)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    x = normal((2, 4, 6, 6), 1)
    assert other(x).abs().sum() > x.relu().sum() * 1.01 and sum(ran.values()) == 3
    assert other.forward.__self__ is other


@pytest.mark.parametrize("make", [Bottleneck, lambda: build("vgg11_bn").features[:4]])
def test_pickles_come_back_working_and_can_be_fused_again(make, ran):
    fused = tk.convert(make(), fuse=True)
    x = normal((2, next(fused.parameters()).shape[1], 6, 6), 1)
    want = fused(x)
    ran.clear()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        ran.clear()
        assert distance(other(x), want) < 1e-5 and not ran
        tk.convert(other, fuse=True)
        assert distance(other(x), want) < 1e-5 and ran
        tk.revert(other)
        assert "forward" not in vars(other)


def _outside(self, x):
    return F.relu(self.bn(x))


class Borrowed(Written):
    forward = _outside


def test_a_pickle_finds_a_method_by_the_name_it_has_in_its_class():
    fused = tk.convert(Borrowed(), fuse=True)
    other = pickle.loads(pickle.dumps(fused))
    assert distance(other(X), fused(X)) < 1e-6


def test_reverting_what_a_pickle_held_is_exact():
    fused = tk.convert(Bottleneck(), fuse=True)
    other = tk.revert(pickle.loads(pickle.dumps(fused)))
    assert keys(other) == keys(Bottleneck())


def test_the_replicas_of_a_data_parallel_run_themselves(ran):
    fused = tk.convert(Plain(), fuse=True)
    replica = fused._replicate_for_data_parallel()
    replicas = replica, replica._replicate_for_data_parallel()
    for one in replicas:
        one.relu = nn.GELU()
        assert distance(one(X), nn.functional.gelu(one.bn(X))) < 1e-6
    assert not ran
    fused(X)
    assert ran == {"act": 1}
    assert "_replicate_for_data_parallel" not in vars(tk.revert(fused))
