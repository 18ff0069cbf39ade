"""Attachment: the gates of one Scores in its model's layers, and those whose place they took."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .blame import stacklevel
from .delivery import collected
from .emission import carry, gate_of
from .gates import Gate
from .layers import scorable

if TYPE_CHECKING:
    from .scores import Scores

_NO_GATE = (
    "these logits depend on no gate: make them by a forward of the scored model, gradients on, and not inside a "
    "reentrant checkpoint, whose graph does not exist before backward"
)

_CURVATURE_ERRORS = {
    "second time": "the graph of these logits is freed: call scores.curvature before loss.backward(), not after",
    "donated buffer": "compiled code has given memory away that scores.curvature needs: set "
    "torch._functorch.config.donated_buffer = False before the first call of the compiled model",
}


class Attachment:
    """A gate of ``owner`` in each of ``layers``, from now on; ``every_element`` as in :class:`Gate`.

    A subclass of a torch layer takes it by a hook, which goes with it. Raises ValueError where one of them is a torch
    layer that was not converted.
    """

    def __init__(self, owner: "Scores", model: nn.Module, layers: Iterable[str], every_element: bool) -> None:
        carriers = {name: module for name, module in model.named_modules() if scorable(module)}
        left_out = [layer for layer in layers if layer not in carriers]
        if left_out:
            raise ValueError(
                f"layer {left_out[0]!r} and {len(left_out) - 1} more hold channels of units but are not converted, so "
                "these units' scores would miss their share; call taylorkern.convert on the whole model"
            )
        self._model = model
        self._before = {layer: gate_of(carriers[layer]) for layer in layers}
        self.gates = {layer: Gate(owner, every_element) for layer in layers}
        for layer, gate in self.gates.items():
            carry(carriers[layer], gate)
        kind = nn.modules.batchnorm._BatchNorm
        self.batch_norms = frozenset(name for name, module in carriers.items() if isinstance(module, kind))

    @property
    def intact(self) -> bool:
        """Whether all the layers still have these gates."""
        layers = dict(self._model.named_modules())
        return all(getattr(layers.get(layer), "gate", None) is gate for layer, gate in self.gates.items())

    def displaced(self) -> "list[Scores]":
        """The Scores whose gates were taken over; warns of each."""
        found = owners(self._before.values())
        for _ in found:
            warnings.warn(
                "the model already feeds another Scores, which is detached: it gets no more minibatches from here on",
                stacklevel=stacklevel(),
            )
        return found

    def withdraw(self) -> None:
        """Give the layers the gates back that they had before."""
        for layer, gate in self._before.items():
            carry(self._model.get_submodule(layer), gate)

    def detach(self) -> None:
        """Take the gates out of those layers that still have them."""
        for layer, gate in self.gates.items():
            module = self._model.get_submodule(layer)
            if gate_of(module) is gate:
                carry(module, None)

    def drain(self) -> dict[str, list[Tensor]]:
        """Take the scores s [N, C] that have arrived since the last call, of the layers that have any."""
        arrived = {layer: gate.drain() for layer, gate in self.gates.items()}
        return {layer: scores for layer, scores in arrived.items() if scores}

    def drain_elements(self) -> dict[str, list[Tensor]]:
        """Take the products a·dL/da [N, C, *S] likewise."""
        arrived = {layer: gate.drain_elements() for layer, gate in self.gates.items()}
        return {layer: products for layer, products in arrived.items() if products}

    def rows(self, logits: Tensor, cotangent: Tensor) -> dict[str, list[Tensor]]:
        """∂⟨logits, cotangent⟩/∂z[n, c] by layer, of the forward that made ``logits``, whose graph stays.

        Raises ValueError where they depend on no gate, and RuntimeError where their graph has been freed.
        """
        leaves = [(layer, z) for layer, gate in self.gates.items() for z in gate.leaves()]
        anchors = [gate.mailbox.anchor for gate in self.gates.values()]
        if not logits.requires_grad:
            raise ValueError(_NO_GATE)
        ends = [*(z for _, z in leaves), *anchors]
        with collected() as delivered, _explained():
            found = torch.autograd.grad(logits, ends, cotangent, retain_graph=True, allow_unused=True)
        numbers = {layer: int(gate.mailbox.address) for layer, gate in self.gates.items()}
        arrived = {layer: delivered[number] for layer, number in numbers.items() if number in delivered}
        for (layer, _), row in zip(leaves, found[: len(leaves)], strict=True):
            if row is not None:
                arrived.setdefault(layer, []).append(row)
        if not arrived:
            raise ValueError(_NO_GATE)
        return arrived


@contextmanager
def _explained() -> Iterator[None]:
    """What autograd says of a graph that can't be used again, in the words of ``Scores.curvature``."""
    try:
        yield
    except RuntimeError as error:
        said = next((said for part, said in _CURVATURE_ERRORS.items() if part in str(error)), None)
        if said is None:
            raise
        raise RuntimeError(said) from error


def attached(model: nn.Module) -> "list[Scores]":
    """Every Scores that has gates in ``model``."""
    return owners(gate_of(module) for module in model.modules())


def owners(gates: Iterable[Gate | None]) -> "list[Scores]":
    """The Scores that asked for these gates, those that are still there, each once."""
    found = (gate.owner() for gate in gates if gate)
    return list({id(owner): owner for owner in found if owner is not None}.values())
