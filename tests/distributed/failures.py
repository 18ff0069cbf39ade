"""A program for torchrun: what one process meets alone, all raise, and nothing has changed. Argument: a folder."""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taylorkern as tk
from tests.distributed.training import counted, leave, loss, made, trained, weights


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def before_a_round(**options) -> tuple[nn.Module, torch.optim.Optimizer, tk.Pruner]:
    """One ``pruner.step()`` is missing."""
    model, optimizer, pruner = made(**options)
    trained((model, optimizer, pruner), range(2))
    ddp = DistributedDataParallel(model)
    optimizer.zero_grad()
    loss(ddp, 2, dist.get_rank()).backward()
    optimizer.step()
    return model, optimizer, pruner


def refused(model: nn.Module, pruner: tk.Pruner) -> dict:
    """What the round raises, and whether the model and the scores are as before."""
    before, scores = weights(model), pruner.scores.state_dict()
    told = message(pruner.step)
    sums = pruner.scores.state_dict()["sums"]
    same = all(torch.equal(scores["sums"][name], sums[name]) for name in sums)
    same &= all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    return {"told": told, "same": same, "minibatches": pruner.scores.minibatches}


def then(pruner: tk.Pruner) -> list:
    return [unit.places for unit in pruner.step()]


def drifted() -> dict:
    model, _, pruner = before_a_round()
    shift = 1e-9 * dist.get_rank()
    model[-1].bias.data[0] += shift
    found = refused(model, pruner)
    model[-1].bias.data[0] -= shift
    return found


def cut_in_one_alone(mode: str) -> dict:
    model, optimizer, pruner = before_a_round(mode=mode)
    if dist.get_rank() == 1:
        optimizer.state[model[0].weight]["odd"] = torch.zeros(3, 7)
    found = refused(model, pruner)
    optimizer.state[model[0].weight].pop("odd", None)
    return found | {"then": then(pruner)}


def choice_in_one_alone() -> dict:
    model, _, pruner = before_a_round()
    choose = pruner._selection.choose
    if dist.get_rank() == 0:
        pruner._selection.choose = lambda *args: choose(*args)[:0]
    found = refused(model, pruner)
    pruner._selection.choose = choose
    return found | {"then": then(pruner)}


def other_arguments() -> dict:
    model, _, pruner = before_a_round(criterion="random", seed=dist.get_rank())
    return refused(model, pruner)


def old_wrapper(unused: bool) -> dict:
    model, optimizer, pruner = made()
    ddp = DistributedDataParallel(model, find_unused_parameters=unused)
    told = [message(lambda: trained((model, optimizer, pruner), range(3), wrap=lambda model: ddp))]
    told.append(message(lambda: trained((model, optimizer, pruner), range(3, 4), wrap=lambda model: ddp)))
    return {"told": told[0] + told[1], "same": True, "minibatches": pruner.scores.minibatches}


def by_itself() -> dict:
    _, _, pruner = before_a_round(group=None)
    calls = counted()
    told = message(pruner.step)
    return {"told": told, "calls": sum(calls.values()), "minibatches": pruner.scores.minibatches}


def in_a_group() -> dict:
    """Each process in a group of its own."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    _, _, own = before_a_round(group=groups[rank])
    told = message(own.step)
    return {"told": told, "other": message(lambda: made(group=groups[1 - rank]))}


def undisturbed() -> dict:
    _, _, pruner = before_a_round()
    return {"then": then(pruner)}


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    found = {
        "undisturbed": undisturbed(),
        "drifted": drifted(),
        "cut": cut_in_one_alone("cut"),
        "mask": cut_in_one_alone("mask"),
        "choice": choice_in_one_alone(),
        "arguments": other_arguments(),
        "old wrapper": old_wrapper(False),
        "old wrapper, unused": old_wrapper(True),
        "by itself": by_itself(),
        "own group": in_a_group(),
    }
    leave(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
