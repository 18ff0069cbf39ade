"""Which module of a model is running."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class Running:
    """Follows the calls of a model's modules; ``left`` is told each that ends, and its output."""

    def __init__(self, model: nn.Module, left: Callable[[nn.Module, Any], None] = lambda module, output: None) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self._left = left
        self._stack: list[nn.Module] = []

    @property
    def module(self) -> nn.Module | None:
        return self._stack[-1] if self._stack else None

    @property
    def path(self) -> str:
        """ "" for the model itself, and outside of it."""
        return self.paths[self._stack[-1]] if self._stack else ""

    @contextmanager
    def followed(self) -> Iterator[None]:
        self._stack = []
        hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if module in self.paths:
            self._stack.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module not in self.paths:
            return
        while self._stack.pop() is not module:
            pass  # calls that ended in an exception which the model handled itself
        self._left(module, output)
