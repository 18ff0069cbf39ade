"""What layer-wise reconstruction makes of a network some of whose units have gone: the rivals of shifted gates.

One consumer after the other, in the order in which they run, is fitted to what it gave in the dense network, from what
it is given now: "refit" solves for all its weights and a bias (as ThiNet), "scale" for a factor per input channel (Kwon
et al.), "bias" adds what is missing on average (FLAP). A consumer is a convolution or linear layer that reads units.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.study.removal import masked
from taylorkern.coupling import Coupling

PLACES = 16  # of an output's positions, drawn anew for each image: neighbours say the same
RIDGE = 1e-3  # of the mean diagonal


@dataclass(frozen=True)
class Moments:
    """Means over images and places of a consumer's unfolded inputs x [F], of e [O] that its outputs lack, and products.

    In float64; ``missing`` is the mean of e, ``products`` [F, F] that of x xᵀ, ``crossed`` [F, O] that of x eᵀ.
    """

    inputs: Tensor
    missing: Tensor
    products: Tensor
    crossed: Tensor


Change = tuple[Tensor, Tensor]  # of the weights [O, F] and of the bias [O]


def bias(weight: Tensor, m: Moments, kept: Tensor, ridge: float) -> Change:
    """Adds the mean of what is missing."""
    return torch.zeros_like(weight), m.missing


def scale(weight: Tensor, m: Moments, kept: Tensor, ridge: float) -> Change:
    """Multiplies the weights of each kept channel by the factor of least squares; ``kept`` is [C]."""
    channels, taps = len(kept), weight.shape[1] // len(kept)
    grouped = (m.products * (weight.T @ weight)).view(channels, taps, channels, taps).sum((1, 3))
    wanted = (m.crossed * weight.T).sum(1).view(channels, taps).sum(1)
    factors = torch.zeros(channels, dtype=weight.dtype)
    factors[kept] = _solve(grouped[kept][:, kept], wanted[kept], ridge)
    return weight * factors.repeat_interleave(taps), torch.zeros_like(m.missing)


def refit(weight: Tensor, m: Moments, kept: Tensor, ridge: float) -> Change:
    """Moves the weights of the kept channels, and a bias, to where the squares are least; ``kept`` is [C]."""
    columns = kept.repeat_interleave(weight.shape[1] // len(kept))
    centred = m.products - torch.outer(m.inputs, m.inputs)
    crossed = m.crossed - torch.outer(m.inputs, m.missing)
    moved = torch.zeros_like(weight)
    moved[:, columns] = _solve(centred[columns][:, columns], crossed[columns], ridge).T
    return moved, m.missing - moved @ m.inputs


def _solve(matrix: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Least squares with a ridge towards no change, relative to the mean diagonal; no change where nothing comes in."""
    level = float(matrix.diagonal().mean()) if len(matrix) else 0.0
    if not level:
        return torch.zeros_like(wanted)
    damped = matrix + ridge * level * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(damped, wanted)


FITS: dict[str, Callable[[Tensor, Moments, Tensor, float], Change]] = {"bias": bias, "scale": scale, "refit": refit}
# What a way's ``repair`` does beside shifting gates.
REPAIRS = {**FITS, "gates and bias": bias}


@dataclass(frozen=True)
class Consumer:
    """A layer that reads units, ``units`` [C] of its input channels, -1 for none; what it was and gave when dense."""

    layer: nn.Module
    units: Tensor
    weight: Tensor
    bias: nn.Parameter | None
    outputs: list[Tensor]  # one [places, O] per minibatch of images


class Calibration:
    """``images`` in minibatches, and what each consumer of the dense ``model`` gives for them."""

    def __init__(self, model: nn.Module, coupling: Coupling, images: Sequence[Tensor]) -> None:
        self.images = images
        self.consumers: list[Consumer] = []
        for layer, name in _in_order(model, coupling, images[0]):
            outputs = [_outputs(layer, rows) for rows in self.rows(model, layer)]
            weight = layer.weight.detach().clone()  # type: ignore[operator]
            units = coupling.axes[f"{name}.weight", 1]
            self.consumers.append(Consumer(layer, units, weight, layer.bias, outputs))  # type: ignore[arg-type]

    @torch.no_grad()
    def rows(self, model: nn.Module, layer: nn.Module) -> Iterator[Tensor]:
        """The unfolded inputs [places, F] of ``layer`` in ``model`` as it is now, a minibatch at a time."""
        for i, images in enumerate(self.images):
            yield unfolded(layer, _input(model, layer, images), seed=i)

    def take_back(self) -> None:
        """Have the consumers' weights and biases as they were."""
        for consumer in self.consumers:
            consumer.layer.weight.data.copy_(consumer.weight)  # type: ignore[union-attr, operator]
            consumer.layer.bias = consumer.bias


@torch.no_grad()
def repair(
    kind: str, model: nn.Module, coupling: Coupling, gates: Tensor, calibration: Calibration, ridge: float = RIDGE
) -> None:
    """Fit every consumer, in their order, to what it gave for the calibration's images in the dense network."""
    stays = torch.cat([gates != 0, torch.tensor([True])])
    with masked(model, coupling.layers, gates):
        for consumer in calibration.consumers:
            found = moments(consumer, calibration.rows(model, consumer.layer))
            weight = _flat(consumer.layer)
            moved, shifted = REPAIRS[kind](weight, found, stays[consumer.units], ridge)
            _set(consumer, weight + moved, _bias_of(consumer.layer) + shifted)


def moments(consumer: Consumer, rows: Iterator[Tensor]) -> Moments:
    """Means over all ``rows`` [places, F] that the consumer is given now."""
    sums: list[Tensor] | None = None
    count = 0
    for x, wanted in zip(rows, consumer.outputs, strict=True):
        e = wanted - _outputs(consumer.layer, x)
        here = [part.double() for part in (x.sum(0), e.sum(0), x.T @ x, x.T @ e)]
        sums = here if sums is None else [a + b for a, b in zip(sums, here, strict=True)]
        count += len(x)
    assert sums is not None
    return Moments(*(total / count for total in sums))


def unfolded(layer: nn.Module, x: Tensor, seed: int) -> Tensor:
    """What ``layer`` multiplies its weights with, [places, F]: of each image ``PLACES`` places at most."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d) and layer.groups == 1 and isinstance(layer.padding, tuple)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(len(x), columns.shape[2], generator=generator).argsort(1)[:, :PLACES]  # [N, places]
    chosen = columns.gather(2, places.unsqueeze(1).expand(-1, columns.shape[1], -1))
    return chosen.transpose(1, 2).reshape(-1, columns.shape[1])


def _in_order(model: nn.Module, coupling: Coupling, images: Tensor) -> list[tuple[nn.Module, str]]:
    """The consumers and their names, as they run."""
    found: list[tuple[nn.Module, str]] = []
    names = [name.removesuffix(".weight") for name, _ in coupling.consumers]
    hooks = [
        layer.register_forward_pre_hook(lambda module, _, name=name: found.append((module, name)))
        for name in names
        for layer in [model.get_submodule(name)]
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


class _ReachedError(Exception):
    """The layer's input is known."""


def _input(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What ``layer`` is given; the model runs no further."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _ReachedError

    hook = layer.register_forward_pre_hook(stop)
    try:
        model(images)
    except _ReachedError:
        return seen[0]
    finally:
        hook.remove()
    raise ValueError(f"{type(layer).__name__} did not run")


@torch.no_grad()
def _outputs(layer: nn.Module, rows: Tensor) -> Tensor:
    """What ``layer`` gives [places, O] for unfolded inputs."""
    return F.linear(rows, layer.weight.flatten(1), layer.bias)  # type: ignore[operator, arg-type]


def _flat(layer: nn.Module) -> Tensor:
    """The weights [O, F] in float64."""
    return layer.weight.detach().double().flatten(1)  # type: ignore[operator]


def _bias_of(layer: nn.Module) -> Tensor:
    """The bias [O] in float64; nought where there is none."""
    own = layer.bias
    return own.detach().double() if isinstance(own, Tensor) else torch.zeros(len(layer.weight), dtype=torch.float64)  # type: ignore[arg-type]


def _set(consumer: Consumer, weight: Tensor, offset: Tensor) -> None:
    """New weights in the old parameter; the bias in a new one, for there may have been none."""
    own = consumer.layer.weight
    assert isinstance(own, Tensor)
    own.data.copy_(weight.view_as(own))
    consumer.layer.bias = nn.Parameter(offset.to(own.dtype))
