"""Gates that multiply for real, at every place of every unit, and what a cut with gates is held to."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bench.zoo import draw, error, masked, outputs
from taylorkern.coupling import couple
from taylorkern.surgery import cut
from tests.networks import randomised
from tests.test_coupling import conv

NOTHING = torch.zeros(0, dtype=torch.int64)


@contextmanager
def gated(model: nn.Module, coupling, z: Tensor):
    """Within, every place of unit u is multiplied by z[u] in a copy of its layer's output."""
    places: dict[str, list[tuple[int, int]]] = {}
    for u, unit in enumerate(coupling.units):
        for layer, channel in unit.places:
            places.setdefault(layer, []).append((channel, u))

    def multiplying(layer: str):
        def multiply(module, inputs, output):
            output = output.clone()
            for channel, unit in places[layer]:
                where = (..., channel) if isinstance(module, nn.Linear) else (slice(None), channel)
                output[where] *= z[unit].to(output.dtype)
            return output

        return multiply

    hooks = [model.get_submodule(layer).register_forward_hook(multiplying(layer)) for layer in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gates(coupling, removed: Tensor) -> Tensor:
    """Some negative, none near 1; NaN for the units that go, where nobody may look."""
    return (0.4 + torch.randn(len(coupling.units), dtype=torch.float64)).index_fill(0, removed, torch.nan)


def of_the_kept(z: Tensor, removed: Tensor) -> Tensor:
    return z.index_fill(0, removed, 1)


def check_folded(model: nn.Module, x: Tensor, removed=None) -> None:
    """Cut with gates and compare, in both modes, with gates and masks that surgery does not know of."""
    coupling = couple(model, x)
    removed = draw(coupling) if removed is None else torch.tensor(removed, dtype=torch.int64)
    z = gates(coupling, removed)
    with masked(model, coupling, removed), gated(model, coupling, of_the_kept(z, removed)):
        expected = [outputs(model, x, training) for training in (False, True)]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    after = cut(model, coupling, removed, x, gates=z)
    for training in (False, True):
        assert error(expected[training], outputs(model, x, training)) < 1e-9
    assert len(after.units) == len(coupling.units) - len(removed)
    for name, buffer in model.named_buffers():
        keep = coupling.staying(removed)[coupling.axes[name, 0]] if (name, 0) in coupling.axes else ...
        assert torch.equal(buffer, buffers[name][keep])


def chain(*activations: nn.Module, width: int = 6) -> nn.Module:
    layers: list[nn.Module] = []
    for i, activation in enumerate(activations):
        layers += [conv(width if i else 2, width, 3, padding=1), nn.BatchNorm2d(width), activation]
    return randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 3)))
