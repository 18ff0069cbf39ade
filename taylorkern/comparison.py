"""Criteria against the oracle: each one's importances, and how they go with the measured change of the loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._version import __version__
from .correlation import COEFFICIENTS, by_layer, correlations, interval
from .coupling import Coupling, couple
from .criteria import CRITERIA, criterion
from .curvature import METHODS, Cotangents, Loss
from .example import copied, run
from .layers import GATED, convert, scorable
from .oracle import oracle
from .scores import Scores
from .state import untouched
from .tally import FROM_CURVATURE

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
}
Batches = Iterable[tuple[Any, Any]]


def importances(
    model: nn.Module,
    example: Any,
    batches: Batches,
    loss_fn: Callable[[Any, Any], Tensor],
    criteria: Sequence[str],
    loss: str | Loss | Cotangents = "cross_entropy",
    methods: Sequence[str] = ("sketch",),
    seed: int = 0,
) -> dict[str, Tensor]:
    """The importance of every unit by each of ``criteria``, over ``batches``, without training: name → [U], float64.

    The converted ``model`` runs in the mode it is in. A criterion that needs curvature appears once per method: as
    "taylor_so" for "sketch", "taylor_so (exact)" and "taylor_so (mc)" for the others; each method is a pass over the
    batches. Random draws come from ``seed`` alone. The parameters' ``.grad``, buffers, modes and random state are put
    back, and the gates are taken off again.

    Raises ValueError where the model can't be scored or a criterion, method or loss is not known; RuntimeError where
    no minibatch gave a finite score.

    >>> model = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))).eval()
    >>> batch = (torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
    >>> found = importances(model, batch[0], [batch], F.cross_entropy, ["taylor_so", "magnitude"], methods=["exact"])
    >>> {name: list(importance.shape) for name, importance in found.items()}
    {'taylor_so (exact)': [4], 'magnitude': [4]}
    """
    minibatches = list(batches)
    curved = [name for name in criteria if needs_curvature(name)]
    found: dict[str, Tensor] = {}
    with _own_gradients(model), untouched(model):
        scores = Scores(model, example, criteria=criteria, seed=seed)
        try:
            for method in methods if curved else (None,):
                _pass(scores, minibatches, loss_fn, method, loss, seed)
                for name in curved if found else criteria:
                    found[column(name, method)] = scores.importance(name)
        finally:
            scores.detach()
    return {name: found[name] for name in columns(criteria, methods)}


def needs_curvature(name: str) -> bool:
    """Whether criterion ``name`` is made of statistics that a curvature method fills.

    >>> needs_curvature("obd"), needs_curvature("taylor_fo")
    (True, False)
    """
    return not set(FROM_CURVATURE).isdisjoint(criterion(name).needs)


def column(name: str, method: str | None) -> str:
    """What the importances of ``name`` by curvature ``method`` are called."""
    return f"{name} ({method})" if needs_curvature(name) and method != "sketch" else name


def columns(criteria: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Every criterion, in order, once per method where it needs one.

    >>> columns(["taylor_fo", "obd"], ["sketch", "exact"])
    ['taylor_fo', 'obd', 'obd (exact)']
    """
    return list(dict.fromkeys(column(name, method) for name in criteria for method in methods))


def compare(
    models: Callable[[int], nn.Module],
    data: Callable[[int], Batches],
    loss: str = "cross_entropy",
    *,
    seeds: Sequence[int] = (0,),
    criteria: Sequence[str] | None = None,
    methods: Sequence[str] = ("sketch",),
    units: int | None = None,
    minibatches: int = 8,
    together: int = 16,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure and score one network per seed, in evaluation mode, and correlate; a dict that JSON can hold.

    ``models(seed)`` returns a trained network, ``data(seed)`` its (inputs, targets), of which the first
    ``minibatches`` are taken. ``criteria`` are all that apply if not named; ``units`` samples that many units, by the
    seed. In ``folder`` the oracle keeps ``oracle-seed*.safetensors`` and goes on from them.

    The result: "facts"; "networks", one per seed: the units measured, the measured "truth" E_b[ΔL²] and signed mean
    "change" of each, the units whose removal lowers the loss, the importances, the "correlation" of "all" units and by
    "layers"; and "summary", of the same form, of the mean over seeds and its bootstrap interval. What is not a number,
    or infinite, is None.

    Raises ValueError where a network can't be measured or scored, or an argument is wrong, and what :func:`oracle`
    raises.
    """
    names = list(CRITERIA) if criteria is None else list(criteria)
    _check(names, methods, loss, seeds, minibatches, units)
    networks = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = _evaluated(models(seed))
        torch.manual_seed(seed)
        taken = _taken(data(seed), minibatches)
        file = folder / f"oracle-seed{seed}.safetensors" if folder else None
        measure = partial(oracle, together=together, progress=progress, file=file)
        networks.append(_network(model, taken, loss, names, methods, seed, units, measure))
    found = columns(names, methods)
    if criteria is None:
        found = [name for name in found if any(_judges(network, name) for network in networks)]
    for network in networks:
        _correlate(network, found)
    facts = {
        "criteria": found,
        "methods": list(methods),
        "loss": loss,
        "mode": "evaluation",
        "seeds": list(seeds),
        "together": together,
        "versions": {"taylorkern": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    return {"facts": facts, "networks": networks, "summary": _summary(networks, found)}


def _check(
    names: Sequence[str], methods: Sequence[str], loss: str, seeds: Sequence[int], minibatches: int, units: int | None
) -> None:
    """Refuse now what would else be refused after a training."""
    for name in names:
        criterion(name)
    if loss not in LOSSES:
        raise ValueError(f"there is no loss {loss!r} to measure; known are {', '.join(LOSSES)}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"method {unknown[0]!r} is not one of {', '.join(METHODS)}")
    if not names or not methods or not seeds:
        raise ValueError("at least one criterion, one method and one seed are needed")
    if minibatches < 1 or (units is not None and units < 1):
        raise ValueError(f"minibatches={minibatches} and units={units} must be at least 1")


def _evaluated(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model's function returned a {type(model).__name__}; it must return a torch.nn.Module")
    modules = list(model.modules())
    if any(type(module) in GATED for module in modules) or not any(map(scorable, modules)):
        convert(model)
    return model.eval().requires_grad_(True)


def _taken(data: Any, minibatches: int) -> list[tuple[Any, Any]]:
    if not isinstance(data, Iterable):
        raise ValueError(
            f"the data's function returned a {type(data).__name__}; it must return (inputs, targets) pairs"
        )
    taken = list(islice(data, minibatches))
    if not taken:
        raise ValueError("the data's function returned no minibatch; it must return (inputs, targets) pairs")
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in taken):
        raise ValueError(f"a minibatch must be a pair (inputs, targets), not a {type(taken[0]).__name__}")
    return [(inputs, targets) for inputs, targets in taken]


def _network(
    model: nn.Module,
    batches: list[tuple[Any, Any]],
    loss: str,
    criteria: Sequence[str],
    methods: Sequence[str],
    seed: int,
    units: int | None,
    measure: Callable[..., Tensor],
) -> dict[str, Any]:
    """What was measured and foretold of one network, per unit."""
    example = batches[0][0]
    coupling = couple(model, example)
    chosen = _sample(len(coupling.units), units, seed)
    found = importances(model, example, batches, LOSSES[loss], criteria, loss, methods, seed)  # the quick part first
    changes = measure(model, example, LOSSES[loss], batches, units=chosen)  # [B, U]
    mean = changes.mean(0)
    return {
        "model": type(model).__name__,
        "seed": seed,
        "minibatches": len(batches),
        "units_found": len(coupling.units),
        "units": chosen.tolist(),
        "layers": _layers(coupling, chosen),
        "truth": _plain(changes.square().mean(0)),
        "change": _plain(mean),
        "not_finite": int((~mean.isfinite()).sum()),
        "removal_lowers_loss": [
            {"unit": int(u), "change": float(change), "places": [list(place) for place in coupling.units[u].places]}
            for u, change in sorted(zip(chosen.tolist(), mean.tolist(), strict=True), key=lambda pair: pair[1])
            if change < 0
        ],
        "importance": {name: _plain(importance.cpu()[chosen]) for name, importance in found.items()},
    }


def _sample(count: int, wanted: int | None, seed: int) -> Tensor:
    if wanted is None or wanted >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def _layers(coupling: Coupling, chosen: Tensor) -> dict[str, list[int]]:
    """Layer, in the network's order → positions in ``chosen`` of its units."""
    found = {
        layer: torch.isin(chosen, units).nonzero().flatten().tolist() for layer, units in by_layer(coupling).items()
    }
    return {layer: positions for layer, positions in found.items() if positions}


def _correlate(network: dict[str, Any], names: Sequence[str]) -> None:
    """Add the coefficients of ``names``, over all units and by layer; importances of others are taken out."""
    truth = _tensor(network["truth"])
    network["importance"] = {name: network["importance"][name] for name in names}
    tensors = {name: _tensor(values) for name, values in network["importance"].items()}

    def among(positions: Sequence[int]) -> dict[str, dict[str, float | None]]:
        index = torch.tensor(positions)
        return {name: _numbers(correlations(truth[index], t[index])) for name, t in tensors.items()}

    network["correlation"] = {
        "all": among(range(len(truth))),
        "layers": {layer: among(positions) for layer, positions in network["layers"].items()},
    }


def _summary(networks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means over the networks with intervals: the form of a network's own correlations."""
    layers = dict.fromkeys(layer for network in networks for layer in network["layers"])

    def over(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: {kind: _mean([table[name][kind] for table in tables]) for kind in COEFFICIENTS} for name in names}

    found = [network["correlation"] for network in networks]
    return {
        "all": over([table["all"] for table in found]),
        "layers": {layer: over([t["layers"][layer] for t in found if layer in t["layers"]]) for layer in layers},
    }


def _mean(values: Sequence[float | None]) -> dict[str, float | int | None]:
    known = [value for value in values if value is not None]
    low, high = interval(known)
    mean = fmean(known) if known else math.nan
    return {**_numbers({"mean": mean, "low": low, "high": high}), "networks": len(known)}


def _pass(
    scores: Scores,
    batches: Batches,
    loss_fn: Callable[[Any, Any], Tensor],
    method: str | None,
    loss: str | Loss | Cotangents,
    seed: int,
) -> None:
    """Fill ``scores`` anew from every minibatch, with the curvature by ``method`` unless that is None."""
    scores.reset()
    torch.manual_seed(seed)
    device = next(scores.model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for inputs, targets in batches:
        output = run(scores.model, copied(inputs))
        if method:
            scores.curvature(output, targets, loss=loss, method=method, generator=generator)
        loss_fn(output, targets).backward()
        scores.model.zero_grad(set_to_none=True)


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Within, parameters start without gradients, and gradients are on; afterwards ``.grad`` is as it was."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def _judges(network: Mapping[str, Any], name: str) -> bool:
    return any(value is not None for value in network["importance"][name])


def _plain(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
