"""couple(): from a model and an example to its units."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import understood
from ..blame import stacklevel
from ..example import repeated
from ..state import named_tensors, untouched
from ..wrapped import refuse_wrapped
from .labels import Ledger
from .rules import Evidence
from .tracer import Tracer
from .trial import Failure, Scene, attempt
from .units import Coupling, resolve


def couple(model: nn.Module, example_inputs: Any) -> Coupling:
    """Find the units of ``model``: the sets of channels that can only be removed together.

    The model runs once in evaluation mode on ``example_inputs`` (a tensor, a tuple or list of arguments, or a dict
    of keyword arguments), with one label per index of every parameter dimension beside the data. Labels that meet
    go together; an operation that is not understood freezes those that come near it and is named in ``frozen``. If
    parameters stayed unused, it runs once more in training mode, for branches that exist only there. Attention's heads
    go as a whole. Then cuts are tried on tensors that stand in for the model's: where its code holds a width as a
    number, what that counts freezes, with the line named, unless it is an attribute that is known to count channels or
    heads (``taylorkern.widths``), which follows. Nothing in the model changes: modes, buffers, other attributes and
    random state are put back.

    Raises ValueError where the model does not run on the example or returns no tensor, and for one that is wrapped or
    sharded (see ``taylorkern.wrapped``).

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> coupling = couple(model, torch.rand(1, 1, 4, 4))
    >>> coupling.units[3].places, coupling.axes["3.weight", 1].tolist()
    ((('0', 3),), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    """
    refuse_wrapped(model)
    choices: dict[str, int] = {}  # of the splits in the model's code, by site
    with understood(model):
        found = _settled(model, example_inputs, choices)
        others = found.untried(choices)
        if others:
            other = _settled(model, example_inputs, others)
            found = max(found, other, key=lambda each: each.coupling.free_units)
    found.warn()
    return found.coupling


def _settled(model: nn.Module, example_inputs: Any, choices: dict[str, int]) -> "_Found":
    while not (found := _Found(model, example_inputs, choices)).settle(choices):
        pass
    return found


# Each trial that fails freezes something or takes another choice, so this ends. Should it take more, surgery's own
# comparison refuses what is wrong.
_TRIALS = 100


class _Found:
    """One trace of a model, and the units that come out of it."""

    def __init__(self, model: nn.Module, example_inputs: Any, choices: Mapping[str, int]) -> None:
        self._model, self._inputs = model, example_inputs
        self._tracer = Tracer(model, named_tensors(model), Ledger(), Evidence(), choices)
        parameters = {name for name, _ in model.named_parameters()}
        with untouched(model):
            _trace(self._tracer, model, example_inputs, training=False)
        self._scenes = [Scene(False, example_inputs, self._tracer.script)]
        self._apart: set[str] = set()  # modules whose attributes mean something else
        self._stopped = ""  # why the model does not run in training mode, if it had to
        self._trained = not parameters <= self._tracer.reached and self._trains()
        self._unreached = tuple(name for name, _ in model.named_parameters() if name not in self._tracer.reached)
        self._resolve()

    def _resolve(self) -> None:
        self.coupling, self._unit = resolve(self._tracer, self._unreached, self._trained, self._apart)

    def settle(self, choices: dict[str, int]) -> bool:
        """Freeze what does not survive a cut; False where a new trace with other ``choices`` is to be made."""
        for _ in range(_TRIALS):
            failure = self._failure() if self.coupling.units else None
            if failure is None:
                return True
            suspects = self._live(failure)
            if self._misled(failure):
                self._apart.add(failure.place.module)
            elif not len(suspects):
                return True
            elif sites := self._sites(suspects, choices):
                choices.update({site: choices.get(site, 0) + 1 for site in sites})
                return False
            else:
                self._freeze(failure, suspects)
            self._resolve()
        return True

    def _failure(self) -> Failure | None:
        found = (attempt(self._model, scene, self.coupling, self._unit) for scene in self._scenes)
        return next((failure for failure in found if failure is not None), None)

    def _live(self, failure: Failure) -> Tensor:
        """The labels to blame that belong to units; where those named don't, those of the operations before."""
        earlier = (labels for step in reversed(failure.steps[:-1]) for labels in step.suspects(None, []))
        return next(filter(self._belong, (*failure.suspects, *earlier)), torch.zeros(0, dtype=torch.int64))

    def _belong(self, labels: Tensor) -> bool:
        return bool((self._unit[labels] >= 0).any())

    def _misled(self, failure: Failure) -> bool:
        """Whether nothing that went in could be cut, so that an attribute must have followed that should not."""
        followed = failure.place.module in {path for path, _ in self.coupling.attributes}
        return followed and not any(map(self._belong, failure.suspects))

    def _sites(self, suspects: Tensor, choices: Mapping[str, int]) -> set[str]:
        """The splits of the units to blame that have another option, or can still be done without."""
        units = self._unit[suspects].unique()
        units = units[units >= 0]
        return {
            split.site
            for split in self._tracer.evidence.splits
            if choices.get(split.site, 0) < split.options and bool(torch.isin(self._unit[split.labels], units).any())
        }

    def _freeze(self, failure: Failure, suspects: Tensor) -> None:
        """Freeze them, and what the same line of code is given elsewhere."""
        self._tracer.ledger.freeze_labels(suspects, failure.place)
        failing = failure.steps[-1]
        steps = () if failure.by_code else (step for scene in self._scenes for step in scene.script)
        for step in steps:
            if step is not failing and step.resembles(failing):
                for labels in step.suspects(None, []):
                    self._tracer.ledger.freeze_labels(labels, step.place)

    def untried(self, choices: Mapping[str, int]) -> dict[str, int]:
        """``choices`` with another one wherever a split layer's channels can't be cut; {} where there is no such."""
        splits = [split for split in self._tracer.evidence.splits if choices.get(split.site, 0) < split.options - 1]
        if not splits:
            return {}
        made, found = self._tracer.made(), self._tracer.ledger.components()
        sites = {
            split.site
            for split in splits
            if bool(found.stuck[split.labels].all() and torch.isin(split.labels, made).any())
            and not bool(found.firm[split.labels].all())
        }
        return {**choices, **{site: choices.get(site, 0) + 1 for site in sites}} if sites else {}

    def _trains(self) -> bool:
        """Trace in training mode too; False where the model can't, not even on a batch of two."""
        self._tracer.counting = False
        for inputs in (self._inputs, repeated(self._inputs)):
            try:
                with untouched(self._model):
                    _trace(self._tracer, self._model, inputs, training=True)
                self._scenes.append(Scene(True, inputs, self._tracer.script))
                return True
            except ValueError as error:
                self._stopped = str(error)
        return False

    def warn(self) -> None:
        """Tell of parameters that no run used, and of a training mode that does not run."""
        if self._stopped and not self._trained:
            warnings.warn(
                f"parameters used only in training will not follow a cut, and training may fail: {self._stopped}",
                stacklevel=stacklevel(),
            )
        if self._unreached:
            warnings.warn(
                f"{self._unreached[0]} and {len(self._unreached) - 1} more parameters were not used on the example "
                "inputs: if other inputs use them, their layers will not follow a cut and will fail; give inputs that "
                "reach them",
                stacklevel=stacklevel(),
            )


def _trace(tracer: Tracer, model: nn.Module, example_inputs: Any, training: bool) -> None:
    model.train(training)
    try:
        tracer.trace(model, example_inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on the example inputs in {'training' if training else 'evaluation'} "
            f"mode; it stopped in module {tracer.module or '(the model itself)'!r}: {error}"
        ) from error
