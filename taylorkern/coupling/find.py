"""couple(): from a model and an example to its units."""

import warnings
from typing import Any

from torch import nn

from ..blame import stacklevel
from ..example import repeated
from ..state import named_tensors, untouched
from .labels import Ledger
from .rules import Evidence
from .tracer import Tracer
from .units import Coupling, resolve


def couple(model: nn.Module, example_inputs: Any) -> Coupling:
    """Find the units of ``model``: the sets of channels that can only be removed together.

    The model runs once in evaluation mode on ``example_inputs`` (a tensor, a tuple or list of arguments, or a dict
    of keyword arguments), with one label per index of every parameter dimension beside the data. Labels that meet
    go together; an operation that is not understood freezes those that come near it and is named in ``frozen``. If
    parameters stayed unused, it runs once more in training mode, for branches that exist only there. Nothing in the
    model changes: modes, buffers and random state are put back.

    Raises ValueError where the model does not run on the example or returns no tensor.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> coupling = couple(model, torch.rand(1, 1, 4, 4))
    >>> coupling.units[3].places, coupling.axes["3.weight", 1].tolist()
    ((('0', 3),), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    """
    named = named_tensors(model)
    ledger, evidence = Ledger(), Evidence()
    tracer = Tracer(model, named, ledger, evidence)
    parameters = {name for name, _ in model.named_parameters()}
    with untouched(model):
        _trace(tracer, model, example_inputs, training=False)
    trained = not parameters <= tracer.reached and _trains(tracer, model, example_inputs)
    unreached = tuple(name for name, _ in model.named_parameters() if name not in tracer.reached)
    if unreached:
        warnings.warn(
            f"{unreached[0]} and {len(unreached) - 1} more parameters were not used on the example inputs: if other "
            "inputs use them, their layers will not follow a cut and will fail; give inputs that reach them",
            stacklevel=stacklevel(),
        )
    return resolve(tracer, unreached, trained)


def _trace(tracer: Tracer, model: nn.Module, example_inputs: Any, training: bool) -> None:
    model.train(training)
    try:
        tracer.trace(model, example_inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on the example inputs in {'training' if training else 'evaluation'} "
            f"mode; it stopped in module {tracer.module or '(the model itself)'!r}: {error}"
        ) from error


def _trains(tracer: Tracer, model: nn.Module, example_inputs: Any) -> bool:
    """Trace in training mode too; False where the model can't, not even on a batch of two."""
    tracer.counting = False
    for inputs in (example_inputs, repeated(example_inputs)):
        try:
            with untouched(model):
                _trace(tracer, model, inputs, training=True)
            return True
        except ValueError as error:
            stopped = str(error)
    warnings.warn(
        f"parameters used only in training will not follow a cut, and training may fail: {stopped}",
        stacklevel=stacklevel(),
    )
    return False
