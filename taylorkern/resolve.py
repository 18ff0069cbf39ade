"""From "FILE.py:NAME" on a command line to the function it names."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_MEANING = {"seed": "the seed", "num_classes": "the number of classes"}


class ResolveError(RuntimeError):
    """What the user named is not there, can't be called, or failed; the message is one line."""


def resolve(named: str, passed: str = "seed") -> Callable[[int], Any]:
    """The function ``named`` as FILE.py:NAME, to be called with one number; the file's folder is importable from it.

    The number is passed on to a parameter called ``passed``, or to the only one without a default; a function that has
    neither is called without arguments.

    Raises ResolveError where there is no such file or name, it is not callable or wants more than one argument, or the
    import fails; the function returned raises it where the user's own does.
    """
    file, _, name = named.rpartition(":")
    if not file or not name:
        raise ResolveError(f"{named!r} names no function; write FILE.py:FUNCTION")
    path = Path(file).resolve()
    if not path.is_file():
        raise ResolveError(f"there is no file {file}, of which {name} was asked for")
    module = _imported(path)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ResolveError(f"{file} has no {name!r}; it has {', '.join(own) or 'no function'}")
    function = getattr(module, name)
    if not callable(function):
        raise ResolveError(f"{name} in {file} is a {type(function).__name__}, not a function")
    return _called(function, named, passed)


@cache  # a file that holds both the model and the data runs once
def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ResolveError(f"{path.name} is no Python file; write FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ResolveError(f"importing {path.name} failed{_told(error)}") from error
    return module


def _called(function: Callable[..., Any], named: str, passed: str) -> Callable[[int], Any]:
    """``function`` with its number at the right place, and its failures in one line."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # built in, without a signature
        parameters = {}.values()
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in fixed]
    if len(wanted) > 1:
        raise ResolveError(f"{named} wants {', '.join(wanted)}; it gets at most one argument, {_MEANING[passed]}")
    by_keyword = any(p.name == passed and p.kind is not p.POSITIONAL_ONLY for p in parameters)

    def call(number: int) -> Any:
        try:
            if by_keyword:
                return function(**{passed: number})
            return function(number) if wanted else function()
        except Exception as error:
            raise ResolveError(f"{named} failed{_told(error)}") from error

    return call


def _told(error: Exception) -> str:
    """Where, below this file, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
    where = f" at {Path(outside[-1].filename).name}:{outside[-1].lineno}" if outside else ""
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"
