"""What the tests of saving and loading share: a small network, all that a refusal must leave alone, doctored files."""

import hashlib
import json

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern import plan as plans


def build(width=8, groups=1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=groups),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


def bits(model):
    """Every tensor: which one it is, where, in which layout, its values, its gradient."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        name: (id(t), t.data_ptr(), t.stride(), t.dtype, t.requires_grad, id(t.grad), t.detach().clone())
        for name, t in tensors.items()
    }


def surroundings(model):
    """Every module's class, mode, hooks and plain attributes."""
    plain = (int, float, str, bool, tuple, type(None))
    return {
        name: (type(m), {k: v for k, v in vars(m).items() if isinstance(v, plain)}, len(m._forward_pre_hooks))
        for name, m in model.named_modules(remove_duplicate=False)
    }


def assert_untouched(model, before):
    tensors, around = before
    after = bits(model)
    assert after.keys() == tensors.keys()
    for name, (*facts, values) in tensors.items():
        assert list(after[name][:-1]) == facts, name
        assert torch.equal(after[name][-1], values), name
    assert surroundings(model) == around


def snapshot(model):
    return bits(model), surroundings(model)


def refuses(path, model, match):
    before = snapshot(model)
    with pytest.raises(tk.StoreError, match=match):
        tk.load(path, model)
    assert_untouched(model, before)


def assert_same_values(model, other):
    """Both hold the same tensors, bit for bit."""
    mine, others = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, other))
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, others[name]), name


def header(path):
    """The JSON header of a safetensors file, and the bytes behind it."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def write(path, head, data):
    """A file of this header, JSON or bytes already."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def sign(path, text):
    """The file again with ``text`` for its plan, and the plan's checksum made good."""
    head, data = header(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    head["__metadata__"] = {plans.PLAN: text, plans.DIGEST: digest}
    write(path, head, data)


def rewrite(path, change):
    """The file again, its plan changed by ``change`` and its checksum made good."""
    plan = json.loads(header(path)[0]["__metadata__"][plans.PLAN])
    change(plan)
    sign(path, json.dumps(plan))


def as_format_1(path):
    """The file as it was written before plans held attributes."""

    def older(plan):
        del plan["attributes"]
        plan["format"] = 1

    rewrite(path, older)
