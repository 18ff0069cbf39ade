"""A program for torchrun: rounds of pruning in several processes. Arguments: a folder, and names of KINDS."""

import sys

import torch
import torch.distributed as dist

from tests.distributed.training import counted, leave, made, trained, weights

KINDS = {
    "cut": {},
    "mask": {"mode": "mask"},
    "mask in float32": {"mode": "mask", "dtype": torch.float32},  # a check in float64 must not reach DDP's hooks
    "surgeon": {"criterion": "surgeon"},
    "smoothed": {"criterion": "taylor_fg", "momentum": 0.5},
    "magnitude": {"criterion": "magnitude"},
}
STEPS = range(11)


def rounds(kind: str) -> dict:
    model, optimizer, pruner = made(**({"mode": "cut"} | KINDS[kind]))
    calls, told = counted(), []
    removed = trained((model, optimizer, pruner), STEPS, after_step=lambda step: told.append(sum(calls.values())))
    places = [unit.places for unit in pruner.scores.units]
    return {"removed": removed, "told": told, "left": places, "weights": weights(model), "kept": pruner.kept}


def main(folder: str, *kinds: str) -> None:
    dist.init_process_group("gloo")
    leave(folder, {kind: rounds(kind) for kind in kinds})


if __name__ == "__main__":
    main(*sys.argv[1:])
