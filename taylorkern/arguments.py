"""Kinds of command-line arguments: what a text must be, and what it stands for."""

import math
from argparse import ArgumentTypeError


def names(text: str) -> list[str]:
    """At least one name, separated by commas.

    >>> names("a, b,")
    ['a', 'b']
    """
    if not (found := [name.strip() for name in text.split(",") if name.strip()]):
        raise ArgumentTypeError(f"{text!r} names nothing")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(int(text), 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(int(text), 0)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (number := float(text)) < math.inf:
        raise ArgumentTypeError(f"{text} is no finite number above 0")
    return number


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= (number := float(text)) < math.inf:
        raise ArgumentTypeError(f"{text} is no finite number of at least 0")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    if above_zero(text) > 1:
        raise ArgumentTypeError(f"{text} is more than 1")
    return float(text)


def _at_least(number: int, least: int) -> int:
    if number < least:
        raise ArgumentTypeError(f"{number} is less than {least}")
    return number
