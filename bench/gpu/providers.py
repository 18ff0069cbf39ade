"""Which backend serves a call of the bench, whatever the table would choose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from taylorkern import backends
from taylorkern.backends import reference


def listed(kind: str) -> list[Any]:
    """The backends that the table has for a kind of device, but for the reference where there is another."""
    table = list(backends.PROVIDERS[kind])
    return [backend for backend in table if backend is not reference] or table


def ranked(kind: str) -> list[Any]:
    """Those among which the fastest is looked for: kernels, where there are several. The reference rounds otherwise."""
    kernels = listed(kind)
    return kernels if len(kernels) > 1 else list(backends.PROVIDERS[kind])


@contextmanager
def serving(kind: str, backend: Any) -> Iterator[None]:
    """Within, ``backend`` alone serves that kind of device; what it doesn't know raises NotImplementedError."""
    before = backends.PROVIDERS[kind]
    backends.PROVIDERS[kind] = (backend,)
    try:
        yield
    finally:
        backends.PROVIDERS[kind] = before


def forced(kind: str, backend: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call``, served by ``backend`` alone."""

    def run() -> Any:
        with serving(kind, backend):
            return call()

    return run
