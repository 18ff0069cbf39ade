"""Masking: units that are gone for everybody but stay where they are, so that no tensor changes its shape."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compensation import rounded
from .coupling import Coupling
from .edits import Edit, clearing, overwriting, perform
from .masks import Mask, masked_units, noughts, put_on
from .moments import clear_moments
from .slices import Indices
from .surgery import Bodies, indices


@torch.inference_mode(False)
def mask(
    model: nn.Module,
    coupling: Coupling,
    removed: Tensor | Sequence[int],
    example_inputs: Any,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    verify: bool = True,
    gates: Tensor | None = None,
    copies: nn.Module | Iterable[nn.Module] | None = None,
) -> Mask:
    """Mask the units ``removed`` (indices into ``coupling.units``) of ``model``, beside those masked already.

    The consumers' weights for them become nought, with their gradients and the per-element state of ``optimizers``,
    and stay so: hooks on the parameters take their gradients away. From then on the network computes, and its other
    weights train, as if the units had been cut; nobody sees what the masked channels compute. No tensor is replaced or
    changes its shape, so ``DistributedDataParallel``, ``torch.compile`` and optimisers notice nothing. In ``copies``
    (see :func:`taylorkern.surgery.cut`) the same weights are nought. ``gates`` are folded into the others as by a cut,
    and with ``verify`` it is checked that these units can be cut, as a cut would.

    Not as after a cut: the weights that make the masked channels have zero gradients, and go on by weight decay and
    momentum; what looks at whole tensors (dropout's random numbers, norms of weights or activations in a loss, Muon)
    sees dense ones. ``load_state_dict`` may bring other values than nought: ``Mask.hold`` clears them, as a pruner does
    in every step. A deep copy of the model holds nought but no mask.

    Returns the model's mask; :func:`taylorkern.surgery.cut` of its units makes the real cut. Raises what a cut raises,
    and nothing has changed then.

    >>> from taylorkern.coupling import couple
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> x = torch.rand(4, 2)
    >>> mask(model, couple(model, x), [1], x).units.tolist()
    [1]
    >>> model(x).sum().backward()
    >>> model[2].weight[0, 1].item(), model[2].weight.grad[0, 1].item(), model[0].weight.grad[1].tolist()
    (0.0, 0.0, [0.0, 0.0])
    """
    gone = torch.cat([indices(removed, coupling), masked_units(model, coupling)]).unique()
    bodies, zeros = Bodies.of(model, copies, coupling, gone, gates), noughts(coupling, gone)
    edits = _clearing(bodies, zeros)
    edits += clear_moments(optimizers, bodies.of_model(zeros), bodies.names)
    if verify and bodies.concerned:
        bodies.check(example_inputs, gates, apart=True)  # autograd's accumulators, which DDP hooks, stay as they are
    perform(edits)
    after = Mask(coupling, gone)
    put_on(model, after)
    return after


def _clearing(bodies: Bodies, zeros: dict[str, Indices]) -> list[Edit]:
    """The edits that fold the gates into all bodies and clear their weights, and gradients, at ``zeros``."""
    edits: list[Edit] = []
    for body in bodies.bodies:
        named = body.named
        edits += [overwriting(named[name], rounded(name, named[name], new)) for name, new in body.scaled.items()]
        edits += [clearing(named[name], entry) for name, entry in zeros.items()]
        grads = {name: named[name].grad for name in zeros if named[name].is_leaf}
        edits += [clearing(grad, zeros[name]) for name, grad in grads.items() if grad is not None]
    return edits
