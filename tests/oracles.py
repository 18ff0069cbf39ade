"""What the tests of the oracle share: minibatches, models, and measurements that are interrupted and counted."""

import torch
import torch.nn.functional as F

import taylorkern as tk
from tests.cases import normal


def batch(seed):
    return normal((6, 2, 8, 8), seed, torch.float64), torch.arange(6) % 5


def made(build):
    torch.manual_seed(0)
    return build().double().eval()


SAMPLES, TOGETHER = 6, 7
CHECKS = 8  # losses beyond those of the units, in a minibatch: the whole's beside them, a unit's alone, 3 noisy of each


class StoppedError(Exception):
    pass


def stopping_after(calls):
    """The mean cross-entropy, ``calls`` times."""
    left = iter(range(calls))

    def loss(output, target):
        if next(left, None) is None:
            raise StoppedError
        return F.cross_entropy(output, target)

    return loss


def measured(model, batches, file, loss=F.cross_entropy, **options):
    """The oracle's changes, and how many copies of a minibatch ran for them; the example is of one sample."""
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[0]))
    try:
        changes = tk.oracle(model, batches[0][0][:1], loss, batches, file=file, **{"together": TOGETHER, **options})
    finally:
        hook.remove()
    return changes, sum(size // SAMPLES for size in sizes if size >= SAMPLES)
