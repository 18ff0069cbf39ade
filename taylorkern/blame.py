"""Whose line a warning points at: the user's who called into this package, however many of ours lie between."""

import sys

_OURS = {__package__, "torch", "contextlib"}  # torch's decorators and context managers stand between our own frames


def stacklevel() -> int:
    """For ``warnings.warn`` in the function that calls this: the nearest caller outside the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level
