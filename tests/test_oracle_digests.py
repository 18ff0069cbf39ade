"""By what a file of measurements knows its minibatches again."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from taylorkern import measurements
from tests.networks import residual
from tests.oracles import batch, made, measured


class Wrapped:
    def __init__(self, classes):
        self.classes = classes


class Slotted:
    __slots__ = ("classes",)

    def __init__(self, classes):
        self.classes = classes


@dataclass(slots=True)
class Labelled:
    classes: torch.Tensor


def loss_of(output, target):
    return F.cross_entropy(output, getattr(target, "classes", None))


@pytest.mark.parametrize("kind", [Wrapped, Slotted, Labelled, lambda classes: SimpleNamespace(classes=classes)])
def test_targets_in_objects_are_told_apart(tmp_path, kind):
    model, (x, target), file = made(residual), batch(1), tmp_path / "oracle.safetensors"
    whole, _ = measured(model, [(x, kind(target))], file, loss_of)
    assert torch.equal(measured(model, [(x, kind(target.clone()))], file, loss_of)[0], whole)
    with pytest.raises(ValueError, match="minibatch 0 had other inputs or targets"):
        measured(model, [(x, kind(4 - target))], file, loss_of)


def test_targets_that_can_not_be_hashed_are_refused_by_name(tmp_path):
    model, (x, target), file = made(residual), batch(1), tmp_path / "oracle.safetensors"
    itself = []
    itself.append(itself)
    hidden = SimpleNamespace(classes=target, read=lambda: target)
    unhashable = {
        "builtins.generator": (n for n in range(3)),
        "builtins.function": hidden,
        "torch.Tensor": torch.eye(2).to_sparse(),
        "holds itself": itself,
    }
    for name, extra in unhashable.items():
        pair = (x, SimpleNamespace(classes=target, extra=extra))
        with pytest.raises(ValueError, match=f"{name}.*call without file="):
            measured(model, [pair], file, loss_of)
        assert measured(model, [pair], None, loss_of)[0].isfinite().all()


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(2, 2)),
        ([torch.zeros(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)]),
        ({"a": 1}, {"b": 1}),
        ([[1], 2], [[1, 2]]),
        ((torch.zeros(1), 1.0), (torch.zeros(1), 2.0)),
        (torch.arange(3).numpy(), torch.arange(1, 4).numpy()),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array([None, 1]), np.array([None, 2])),
        (np.ma.array([1, 2], mask=[0, 0]), np.ma.array([1, 2], mask=[0, 1])),
        (np.float32(1), np.float32(2)),
        (Wrapped([torch.zeros(2)]), Wrapped([torch.ones(2)])),
        (Wrapped(Wrapped(1)), Wrapped(Wrapped(2))),
        (Slotted(torch.zeros(2)), Slotted(torch.ones(2))),
        (SimpleNamespace(a=1), SimpleNamespace(b=1)),
        (Path("a"), Path("b")),
        ({1, 2}, {1, 3}),
        (torch.float32, torch.float64),
        (Wrapped, Slotted),
        (F.relu, F.gelu),
        (torch.zeros(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj()),
    ],
)
def test_digests_tell_contents_apart(one, other):
    assert measurements.digest(one) == measurements.digest(copy.deepcopy(one))
    assert measurements.digest(one) != measurements.digest(other)


def test_a_sets_order_does_not_count():
    """Two that collide in a set's table stand in it in the order they came in."""
    assert list({8, 0}) != list({0, 8})
    assert measurements.digest({8, 0}) == measurements.digest({0, 8})
