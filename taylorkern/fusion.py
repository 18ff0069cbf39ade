"""Finds the chains of batch normalisation, addition and activation in a model, and has its modules run them fused.

An ``nn.Sequential`` gets a forward that hands promises from child to child; of other modules the methods are rewritten
around the chains (see ``taylorkern.rewriting``). The new methods are attributes of the instances: classes, modules,
parameters, state_dict and repr stay as they are. A deep copy is fused like the original, a pickle comes back unfused.
A method that is put into a module's class later is not seen, and a shallow copy (``copy.copy``) runs the original, as
do the replicas that ``nn.DataParallel`` makes of what a pickle held: revert before either, or fuse again after loading.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from . import deferred
from .activations import MODULES
from .blame import stacklevel
from .rewriting import rewritten
from .sources import Dotted, RewriteError, source
from .spelling import ACTIVATION, CODE, LINK, MODULE, NORM, is_function

_FUSED = "_fused_by_taylorkern"


def fuse(model: nn.Module) -> None:
    """Fuse what can be fused in ``model``, in place, and warn once of what was left although it looks as if it could.

    >>> from taylorkern.layers import convert, revert
    >>> model = convert(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    >>> fuse(model)
    >>> "forward" in vars(model), "forward" in vars(revert(model))
    (True, False)
    """
    left = []
    for path, module in model.named_modules():
        reason = _fuse(module)
        if reason and _looks_fusible(module):
            left.append(f"{path or 'the model'} ({type(module).__name__}): {reason}")
    if left:
        more = f"; and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(f"fusion leaves {left[0]}{more}", UserWarning, stacklevel=stacklevel())


def unfuse(model: nn.Module) -> None:
    """Give every module of ``model`` its own code back."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if _is_fused(value)]:
            del vars(module)[name]
        _forget_pickled(module)


def _fuse(module: nn.Module) -> str:
    """Fuse one module; why nothing was, or "" where something was."""
    _forget_pickled(module)
    if "forward" in vars(module) and not _is_fused(vars(module)["forward"]):
        return "the instance has a forward of its own"
    if isinstance(module, torch.fx.GraphModule):
        return "its code is made from a graph, and may be made anew"
    if deferred.runs_its_children(module):
        return _fuse_children(module)
    if not any(type(inner) in deferred.NORMALISATIONS for inner in module.modules()):
        return ""
    try:
        methods = {name: new for name, function in _methods(module).items() if (new := _fused(module, name, function))}
    except RewriteError as error:
        return str(error)
    for name, method in methods.items():
        _install(module, name, method)
    return "" if methods else "no activation follows a batch normalisation where that can be told from the code"


def _fuse_children(module: nn.Module) -> str:
    if not any(a and b for a, b in _pairs(module)):
        return "no activation follows a batch normalisation"
    _install(module, "forward", deferred.forward)
    return ""


def _pairs(module: nn.Module) -> Iterator[tuple[bool, bool]]:
    """Of neighbours in a Sequential, identities aside: whether the first normalises, whether the second activates."""
    children = [child for child in module if type(child) is not nn.Identity]  # type: ignore[attr-defined]
    for first, second in pairwise(children):
        yield _role(first) == NORM, _role(second) == ACTIVATION


def _install(module: nn.Module, name: str, function: Callable) -> None:
    for attribute, method in ((name, function), (_REPLICATE, _replica)):
        vars(method)[_FUSED] = True
        vars(module)[attribute] = MethodType(method, module)


_REPLICATE = "_replicate_for_data_parallel"


def _replica(self: nn.Module) -> nn.Module:
    """``nn.Module``'s, for ``nn.DataParallel``: a shallow copy, whose methods must be bound to itself."""
    replica: nn.Module = getattr(type(self), _REPLICATE)(self)
    for name, value in vars(self).items():
        if _is_fused(value):
            vars(replica)[name] = MethodType(value.__func__, replica)
    return replica


_replica.__name__ = _REPLICATE  # by which a pickle finds the class's own


def _is_fused(value: Any) -> bool:
    return isinstance(value, MethodType) and _FUSED in vars(value.__func__)


def _forget_pickled(module: nn.Module) -> None:
    """A pickle holds a fused method by its name, so it comes back as the class's own, an attribute without need."""
    for name, value in list(vars(module).items()):
        bound = isinstance(value, MethodType) and value.__self__ is module
        if bound and value.__func__ is getattr(type(module), name, None):
            del vars(module)[name]


def _methods(module: nn.Module) -> dict[str, FunctionType]:
    """The module's forward and the methods it may call, by name; none of ``nn.Module``'s. Raises RewriteError."""
    found: dict[str, FunctionType] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        function = inspect.getattr_static(type(module), name, None)
        own = name in vars(module) and not _is_fused(vars(module)[name])
        known = name in found or own or function is inspect.getattr_static(nn.Module, name, None)
        if known or not isinstance(function, FunctionType):
            continue
        try:
            waiting += [dotted[0] for dotted in source(function).dotted()]
        except RewriteError:
            if name == "forward":
                raise
            continue
        found[name] = function
    return found


def _fused(module: nn.Module, name: str, function: FunctionType) -> FunctionType | None:
    found = ((dotted, _role_at(module, dotted)) for dotted in source(function).dotted())
    return rewritten(function, name, frozenset((dotted, role) for dotted, role in found if role is not None))


def _role_at(module: nn.Module, dotted: Dotted) -> str | None:
    """What the attribute ``dotted`` of ``module`` is, without running any code of its."""
    found: Any = module
    for name in dotted:
        if not isinstance(found, nn.Module):
            return None if isinstance(found, _DATA) else CODE
        own = next((held[name] for held in _held(found) if name in held), _MISSING)
        if own is _MISSING:
            own = inspect.getattr_static(type(found), name, None)
            return CODE if hasattr(own, "__get__") else None
        found = own
    return _role(found)


def _held(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers, vars(module)


_MISSING = object()
_DATA = (torch.Tensor, int, float, str, tuple, list, dict, type(None))


def _role(found: Any) -> str | None:
    if type(found) in deferred.NORMALISATIONS or _ends_in_norm(found):
        return NORM
    if type(found) in MODULES or is_function(found):
        return ACTIVATION
    if found is None or type(found) is nn.Identity:
        return LINK
    if isinstance(found, nn.Module):
        return MODULE
    return CODE if callable(found) else None


def _ends_in_norm(found: Any) -> bool:
    """Whether ``found`` is an ``nn.Sequential`` that can hand on a promise."""
    if not deferred.runs_its_children(found):
        return False
    layers = [layer for layer in found if type(layer) is not nn.Identity]
    return bool(layers) and _role(layers[-1]) == NORM


def _looks_fusible(module: nn.Module) -> bool:
    kinds = {type(child) for child in module.children()}
    return bool(kinds.intersection(deferred.NORMALISATIONS) and kinds.intersection(MODULES))
