"""Models in wrappers, in pieces or compiled are refused with what to give instead, and are as they were."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import taylorkern as tk
from taylorkern.layers import GATED
from tests.distributed.alone import alone  # noqa: F401
from tests.networks import plain, residual

X = torch.randn(2, 2, 8, 8)


def compiled(model, mesh):
    return torch.compile(model, backend="eager")


def inside(model, mesh):
    model[3] = DistributedDataParallel(model[3])
    return model


WRAPPED = {
    "data-parallel": (lambda model, mesh: DistributedDataParallel(model), "its attribute .module"),
    "data-parallel inside": (inside, "3 \\(DistributedDataParallel\\).*its attribute .module"),
    "compiled": (compiled, "give the network that was compiled"),
    "FSDP1": (lambda model, mesh: FullyShardedDataParallel(model, device_id=torch.device("cpu")), "pieces"),
    "FSDP2": (lambda model, mesh: fully_shard(model, mesh=mesh), "0.weight \\(DTensor\\) holds pieces"),
}
USES = {
    "convert": tk.convert,
    "couple": lambda model: tk.couple(model, X),
    "Scores": lambda model: tk.Scores(model, X),
    "Scores of channels": lambda model: tk.Scores(model, None),
    "Pruner": lambda model: tk.Pruner(model, X),
    "prune": lambda model: tk.prune(model, X, torch.zeros(3)),
    "prune by a criterion": lambda model: tk.prune(model, X, criterion="taylor_fo"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("use", USES)
def test_wrapped_models_are_refused(alone, kind, use):  # noqa: F811
    wrap, why = WRAPPED[kind]
    model = wrap(residual(), alone)
    with pytest.raises(ValueError, match=why):
        USES[use](model)
    assert not any(type(module) in GATED.values() for module in model.modules())


@pytest.mark.parametrize("kind", ["data-parallel", "compiled"])
def test_what_is_inside_is_taken(alone, kind):  # noqa: F811
    model = plain()
    outer = WRAPPED[kind][0](model, alone)
    scores = tk.Scores(tk.convert(model), X)
    nn.functional.cross_entropy(outer(X), torch.tensor([0, 1])).backward()
    assert scores.minibatches == 1
    before = len(scores.units)
    removed = tk.prune(model, X, scores.importance("taylor_fo"), target=0.8)
    assert removed and len(scores.units) == before - len(removed)


def test_a_part_that_is_compiled_in_place_is_no_wrapper():
    model = tk.convert(plain())
    model.compile(backend="eager")
    assert tk.couple(model, X).units
