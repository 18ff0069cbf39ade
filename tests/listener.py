"""A stand-in for Scores, to whom gates deliver: it counts no units, so a layer's s can be looked at by itself."""

from torch import Tensor, nn

from taylorkern.attachment import Attachment
from taylorkern.layers import scorable


class Listener:
    """Gates in ``layers`` of ``model``, in all that can take one where none are named."""

    expects_forward = False

    def __init__(self, model: nn.Module, layers: list[str] | None = None, every_element: bool = False) -> None:
        self.model = model
        names = [name for name, module in model.named_modules() if scorable(module)] if layers is None else layers
        self.attachment = Attachment(self, model, names, every_element)

    def forward_begins(self) -> None:
        """Nothing is folded: what has arrived waits for ``heard``, or for the next forward to add to it."""

    def forward_repeats(self) -> None:
        """A checkpoint's."""

    def backward_delivers(self) -> None:
        """Nor in compiled code."""

    def heard(self) -> dict[str, list[Tensor]]:
        return self.attachment.drain()

    def heard_of(self, layer: str = "") -> Tensor:
        """The one s [N, C] that ``layer`` has got."""
        (s,) = self.heard()[layer]
        return s

    def detach(self) -> None:
        self.attachment.detach()
