"""Our scores and pruner in other people's tools, one module for each tool."""

from contextlib import suppress

from ..companion import torchvision

with suppress(ImportError, RuntimeError):  # they import it themselves where it is installed
    torchvision()
