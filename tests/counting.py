"""Who served which operation in a test run: calls are counted where they arrive, at the provider."""

import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from taylorkern import backends, direct

CALLS: Counter[tuple[str, str]] = Counter()  # by provider's label and operation
_DIRECT = {name: f"{name} batch normalisation in C++, its backward too" for name in ("fused", "gated")}
# Providers of tests: the class, where its module was imported, and what to call it.
_OF_TESTS = {("tests.emulated", "Provider"): "CUDA C++ emulated on the CPU"}


def count(operation: str, provider: str, calls: int = 1) -> None:
    """Add calls of an operation that nobody else counts."""
    CALLS[provider, operation] += calls


def counted(provider: Any, label: Callable[[torch.Tensor], str]) -> None:
    """Count from here on what ``provider``, a module, object or class, serves; ``label`` is made of a call's tensor."""
    for operation in backends.OPERATIONS:
        function = getattr(provider, operation)
        if not hasattr(function, "__wrapped__"):
            setattr(provider, operation, _counting(function, operation, label))


def start() -> None:
    """Count the providers of the table, and batch normalisations that run in C++ from end to end."""
    for provider in {id(p): p for of in backends.PROVIDERS.values() for p in of}.values():
        counted(provider, _label_of(provider))
    for name, told in _DIRECT.items():
        function = getattr(direct, name)
        if not hasattr(function, "__wrapped__"):
            setattr(direct, name, _counting(function, told, lambda _: ""))


def start_those_of_tests() -> None:
    """The same for providers that only tests have, of modules that are imported by now."""
    for (module, name), label in _OF_TESTS.items():
        if module in sys.modules:
            counted(getattr(sys.modules[module], name), lambda _, label=label: label)


def report() -> list[str]:
    """What ran, and what did not, and why."""
    ran = [f"{told}{f' by {label}' if label else ''}: {calls} calls" for (label, told), calls in sorted(CALLS.items())]
    labels = {label for (label, _), calls in CALLS.items() if calls}
    idle = {}
    for device, providers in backends.PROVIDERS.items():
        for provider in providers:
            label = _name(provider) + _on(provider, device)
            if label not in labels:
                idle[label] = _why(provider, device)
    for label in _OF_TESTS.values():
        if label not in labels:
            idle[label] = "no test of it was chosen, or all were skipped"
    return [line for line in ran if not line.endswith(": 0 calls")] + [f"{k} did not run: {v}" for k, v in idle.items()]


def _counting(function: Callable, operation: str, label: Callable[[torch.Tensor], str]) -> Callable:
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if result is not None:
            first = next((t for t in arguments if isinstance(t, torch.Tensor)), None)
            CALLS[label(first) if first is not None else "", operation] += 1
        return result

    return call


def _label_of(provider: Any) -> Callable[[torch.Tensor], str]:
    return lambda tensor: _name(provider) + _on(provider, tensor.device.type)


def _name(provider: Any) -> str:
    return provider.__name__.rpartition(".")[2]


def _on(provider: Any, device: str) -> str:
    """Where it says something: the others are of one device."""
    places = {"reference": {"cpu": ""}, "triton_operations": {"cpu": " under the interpreter"}}
    return places.get(_name(provider), {device: ""}).get(device, f" on {device}")


def _why(provider: Any, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    status = getattr(provider, "status", None)
    found = status() if status else None
    return found.reason if found and not found.usable else "no test asked an operation of it"
