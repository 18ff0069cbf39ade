"""Pruning in a training loop of one's own: mixed precision, accumulation, clipping, and checkpoints to go on from."""

import sys
from tempfile import mkdtemp

import torch
from digits import PRUNING, example, minibatches, network, optimiser
from torch import nn

import taylorkern as tk
from taylorkern.coupling import Unit


def train(
    folder: str | None = None, epochs: int = 2, accumulate: int = 1, half: bool = False
) -> tuple[nn.Module, list[list[Unit]]]:
    """The pruned network, and the units that every round removed. Goes on from the last epoch kept in ``folder``."""
    model = tk.convert(network())
    optimizer = optimiser(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)  # float16 needs it, bfloat16 does not
    pruner = tk.Pruner(model, example(), optimizer=optimizer, scaler=scaler, **PRUNING)
    checkpoints = tk.Checkpoints(folder or mkdtemp(), model=model, optimizer=optimizer, scaler=scaler, pruner=pruner)
    done = checkpoints.load() or {"step": 0}  # None in a new folder
    removed = []
    for epoch in range(done["step"], epochs):
        for number, batch in enumerate(minibatches(), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(**batch)["loss"] / accumulate
            scaler.scale(loss).backward()
            if number % accumulate:
                continue
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            removed += [units] if (units := pruner.step()) else []
            optimizer.zero_grad()
        checkpoints.save(epoch + 1)
    return model, removed


if __name__ == "__main__":
    model, removed = train(sys.argv[1] if len(sys.argv) > 1 else None, accumulate=2, half=True)
    print(f"{sum(map(len, removed))} units removed in {len(removed)} rounds; left:", model, sep="\n")
