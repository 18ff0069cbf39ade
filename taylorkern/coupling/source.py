"""Where in the model's own code an operation was called."""

import sys
from functools import cache
from pathlib import Path

import torch

from .. import example

_SKIPPED = tuple(f"{Path(module).parent}/" for module in (torch.__file__, example.__file__))


def line() -> str:
    """ "package/file.py:12" of the innermost code that is neither torch's nor ours, "" where there is none."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not example.run.__code__:
        file = frame.f_code.co_filename
        if not file.startswith(_SKIPPED) and not file.startswith("<"):
            return f"{_short(file)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@cache
def _short(file: str) -> str:
    """From the package's folder on, or the file's own name where it is in none."""
    path = Path(file)
    top = path.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    return path.relative_to(top).as_posix()
