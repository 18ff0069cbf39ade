"""Networks by name: torchvision's, timm's, or what a function of a file returns."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from taylorkern import companion
from taylorkern.errors import CommandError, one_line
from taylorkern.resolve import resolve

_WHOLE = {"init_weights": True, "aux_logits": False}  # with auxiliary logits, what they return in training is a tuple
ARGUMENTS = {"googlenet": _WHOLE, "inception_v3": _WHOLE}


def network(named: str, classes: int, seed: int) -> nn.Module:
    """A new network for so many ``classes``, whose random weights are those of ``seed``.

    ``named`` is torchvision:NAME, timm:NAME or FILE.py:FUNCTION. A function gets the number of classes as its
    parameter ``num_classes``, or as the only one without a default; one that has neither is called as it is.

    Raises CommandError for a name that is not known, a package that is missing or what is no torch.nn.Module, and
    ResolveError where the user's file fails.
    """
    source, colon, name = named.partition(":")
    if not colon:
        raise CommandError(f"--model {named} names no network; write torchvision:NAME, timm:NAME or FILE.py:FUNCTION")
    torch.manual_seed(seed)
    built = SOURCES[source](name, classes) if source in SOURCES else resolve(named, passed="num_classes")(classes)
    if not isinstance(built, nn.Module):
        raise CommandError(f"--model {named} gave a {type(built).__name__}; a torch.nn.Module is needed")
    return built


def of_torchvision(name: str, classes: int) -> Any:
    """torchvision's classification network of this name, without weights."""
    models = _torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise CommandError(_unknown("torchvision", name, known))
    options = {"weights": None, "num_classes": classes}
    return _built(f"torchvision:{name}", models.get_model, name, **options, **ARGUMENTS.get(name, {}))


def of_timm(name: str, classes: int) -> Any:
    """timm's network of this name, without weights."""
    _torchvision()
    timm = _imported("timm")
    if not timm.is_model(name):
        raise CommandError(_unknown("timm", name, timm.list_models()))
    return _built(f"timm:{name}", timm.create_model, name, pretrained=False, num_classes=classes)


SOURCES: dict[str, Callable[[str, int], Any]] = {"torchvision": of_torchvision, "timm": of_timm}


def _built(named: str, make: Callable[..., Any], *positional: Any, **options: Any) -> Any:
    try:
        return make(*positional, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CommandError(f"--model {named} can't be built for these classes: {one_line(error)}") from error


def _torchvision() -> Any:
    try:
        return companion.torchvision()
    except ImportError as error:
        raise _missing("torchvision", error) from error
    except RuntimeError as error:
        raise _unloadable(error) from error


def _unloadable(error: Exception) -> CommandError:
    return CommandError(f"torchvision can't be imported: {one_line(error)}; install the one made for this torch")


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package, error) from error


def _missing(package: str, error: ImportError) -> CommandError:
    return CommandError(f"{package} can't be imported ({one_line(error)}): pip install {package}")


def _unknown(source: str, name: str, known: list[str]) -> str:
    alike = [other for other in known if name and name.lower().replace("-", "_")[:4] in other][:8]
    told = f"; it has {', '.join(alike)}" if alike else ""
    return f"--model {source}:{name}: {source} has no classification network {name!r}{told}"
