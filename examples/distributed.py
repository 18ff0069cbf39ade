"""Train and prune in several processes: torchrun --nproc-per-node 2 examples/distributed.py [FOLDER]

Each process sees minibatches of its own; in a round all remove the same units. Killed and started again with the same
folder, it goes on where its last checkpoint was written.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taylorkern as tk

STEPS = 60


def network() -> nn.Module:
    torch.manual_seed(0)  # the same weights in every process
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


def minibatch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, brighter in the channel that is the label. Yours come from a DataLoader with a DistributedSampler."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images, labels = torch.randn(16, 3, 16, 16, generator=generator), torch.randint(3, (16,), generator=generator)
    images[torch.arange(16), labels] += 0.3
    return images, labels


def main(folder: str = "distributed-out") -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank()
    model = tk.convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = tk.Pruner(model, minibatch(0, 0)[0][:1], optimizer=optimizer, target=0.5, every=10, step=3)
    checkpoints = tk.Checkpoints(folder, model=model, optimizer=optimizer, pruner=pruner)
    found = checkpoints.load()
    ddp = DistributedDataParallel(model)
    for step in range(found["step"] if found else 0, STEPS):
        images, labels = minibatch(step, rank)
        loss = nn.functional.cross_entropy(ddp(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if removed := pruner.step():
            ddp = DistributedDataParallel(model)  # after a cut, always; with mode="mask" never
            if rank == 0:
                print(f"step {step}: {len(removed)} units went, {pruner.kept:.0%} of the FLOPs left, loss {loss:.3f}")
        if (step + 1) % 5 == 0:
            checkpoints.save(step + 1)
    if rank == 0:
        tk.save(model, f"{folder}/pruned.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
