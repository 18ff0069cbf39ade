"""Which channels of a model can only be removed together, found by running it once with labels beside the data."""

from .find import couple
from .labels import Axis, Frozen
from .units import Cost, Coupling, Unit

__all__ = ["Axis", "Cost", "Coupling", "Frozen", "Unit", "couple"]
