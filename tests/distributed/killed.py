"""A program for torchrun: training kept in checkpoints. Arguments: a folder, and the step whose first run is killed."""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from taylorkern.checkpoints import Checkpoints
from tests.distributed.training import leave, made, trained

STEPS, EVERY = 16, 3


def main(folder: str, kill_at: str = "-1") -> None:
    dist.init_process_group("gloo")
    where, rank = Path(folder), dist.get_rank()
    (where / f"{rank}.pid").write_text(str(os.getpid()))
    model, optimizer, pruner = made(momentum=0.9, every=4, step=3)
    checkpoints = Checkpoints(where / "kept", model=model, optimizer=optimizer, pruner=pruner)
    found = checkpoints.load()
    removed = found["removed"] if found else []
    start = found["step"] if found else 0
    marker = where / "killed"

    def after_step(step: int) -> None:
        if step == int(kill_at) and rank == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(start, STEPS, EVERY):
        end = min(step + EVERY, STEPS)
        went = trained((model, optimizer, pruner), range(step, end), after_step=after_step)
        removed += [[[list(place) for place in places] for places in units] for units in went]
        checkpoints.save(end, removed=removed)
    leave(folder, {"parts": checkpoints.state_dict()["parts"], "removed": removed, "from": start})


if __name__ == "__main__":
    main(*sys.argv[1:])
