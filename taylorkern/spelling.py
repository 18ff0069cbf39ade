"""How a step of a chain is written: what a name in a method stands for, where a chain opens in an expression, where it
closes, and what may stand in between."""

import ast
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .activations import FUNCTIONS, METHODS
from .sources import HELPER, Dotted, Source, dotted

# What an attribute of the instance is. Data has no role; code is whatever runs some of the class's own.
NORM, ACTIVATION, LINK, MODULE, CODE = "norm", "activation", "link", "module", "code"
CALLED = (NORM, ACTIVATION, LINK, MODULE)


class Names:
    """What the names in a function stand for, as far as can be told before it runs."""

    def __init__(self, found: Source, roles: dict[Dotted, str]) -> None:
        code = found.function.__code__
        self.this, self.roles, self.globals = found.this, roles, found.function.__globals__
        self.own = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}

    def normalises(self, node: ast.AST) -> bool:
        """A normalisation of the instance, or a local callable, of which the call will tell."""
        return self.role(node) == NORM or self.local(node) is not None

    def links(self, node: ast.AST) -> bool:
        return self.role(node) == LINK

    def activates(self, node: ast.AST) -> bool:
        names = dotted(node)
        if names is None or names[0] in self.own:
            return self.role(node) == ACTIVATION
        found: Any = self.globals.get(names[0])
        for attribute in names[1:]:
            found = vars(found).get(attribute) if isinstance(found, (ModuleType, type)) else None
        return is_function(found)

    def role(self, node: ast.AST) -> str | None:
        names = dotted(node)
        return self.roles.get(names[1:]) if names is not None and names[0] == self.this else None

    def local(self, node: ast.AST) -> str | None:
        """The name of a variable that is not the instance."""
        return node.id if isinstance(node, ast.Name) and node.id in self.own and node.id != self.this else None


def is_function(found: Any) -> bool:
    """Whether ``found`` is one of the functions that can close a chain."""
    return any(found is function for function in FUNCTIONS)


class _Quiet(ast.NodeVisitor):
    """Looks for code that could tell, or change, whether a normalisation has run: ``loud`` says that there is some.

    Calls of other modules are quiet, and so is plain data of the instance. What looks into a normalisation, is handed
    the instance, or runs a method of it may read running statistics that are not there yet.
    """

    def __init__(self, names: Names, waiting: frozenset[str]) -> None:
        self.names, self.waiting = names, waiting  # the variables that hold normalisations which wait
        self.loud = False

    def visit_Call(self, node: ast.Call) -> None:
        function, *arguments = node.args if _hands_on(node) else (node.func, *node.args)
        if isinstance(function, ast.Subscript) and self.names.role(function.value) == MODULE:
            self.visit(function.slice)
        elif not (self.names.role(function) in CALLED or self._waits(function)):
            self.visit(function)
        for argument in (*arguments, *node.keywords):
            self.visit(argument)

    def visit_Compare(self, node: ast.Compare) -> None:
        identity = all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)
        for side in (node.left, *node.comparators):
            if not (identity and self.names.role(side) in CALLED):
                self.visit(side)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names = dotted(node)
        if names is None or names[0] != self.names.this:
            self.loud = self.loud or node.attr in _OF_A_NORM
            self.visit(node.value)
        else:
            inside = (self.names.roles.get(names[1:end]) for end in range(2, len(names)))
            self.loud = self.loud or self.names.role(node) is not None or any(role in (NORM, CODE) for role in inside)

    def visit_Name(self, node: ast.Name) -> None:
        self.loud = self.loud or node.id in (self.names.this, "super") or self._waits(node)

    def _waits(self, node: ast.AST) -> bool:
        return self.names.local(node) in self.waiting


# By what a variable may be known to be a normalisation that is looked into.
_OF_A_NORM = set(dir(nn.BatchNorm2d(1))) - set(dir(Tensor))


def quiet(names: Names, node: ast.AST, waiting: frozenset[str] = frozenset()) -> bool:
    """Whether ``node`` may run before a normalisation that comes before it."""
    visitor = _Quiet(names, waiting)
    visitor.visit(node)
    return not visitor.loud


def opening(names: Names, node: ast.expr) -> ast.expr | None:
    """B(E) as start(B, E), and its sum with something as plus(…)."""
    call = call_of_one(node)
    if call is not None and names.normalises(call.func):
        return helper("start", call, call.func, call.args[0])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _opening_sum(names, node)
    return None


def _opening_sum(names: Names, node: ast.BinOp) -> ast.expr | None:
    left = None if is_sum(node.left) else opening(names, node.left)
    if left is not None and quiet(names, node.right, waiting(left)):
        return helper("plus", node, left, node.right)
    right = None if is_sum(node.right) else opening(names, node.right)
    return None if right is None else helper("plus", node, node.left, right)


def waiting(opened: ast.AST) -> frozenset[str]:
    """The variables whose calls ``opened`` puts off: b of start(b, …)."""
    called = (call.args[0] for call in _helper_calls(opened, "start"))
    return frozenset(function.id for function in called if isinstance(function, ast.Name))


def calls_helper(node: ast.AST, name: str) -> bool:
    return any(_helper_calls(node, name))


def _helper_calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and dotted(inner.func) == (HELPER, name):
            yield inner


Opened = Callable[[ast.expr], ast.expr | None]


def closing(names: Names, node: ast.expr, opened: Opened, by: str = "close") -> ast.expr | None:
    """A(a, …), a.relu() or a.relu_() as close(A, a, …), if ``opened`` takes a."""
    if not isinstance(node, ast.Call):
        return None
    method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS
    if method and not node.args and not node.keywords:
        assert isinstance(node.func, ast.Attribute)
        a = opened(node.func.value)
        return None if a is None else helper(by, node, _attribute(node.func.attr), a)
    if not node.args or not names.activates(node.func) or not _plain_options(names, node):
        return None
    a = opened(node.args[0])
    return None if a is None else helper(by, node, node.func, a, *node.args[1:], keywords=node.keywords)


def _plain_options(names: Names, node: ast.Call) -> bool:
    """Whether the arguments behind the first are values, no code that could see that the first is a promise."""
    values = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
    plain = all(isinstance(node, _OF_VALUES) for value in values for node in ast.walk(value))
    return plain and all(k.arg is not None for k in node.keywords) and all(quiet(names, value) for value in values)


_OF_VALUES = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.Load)


def _hands_on(node: ast.Call) -> bool:
    """Whether ``node`` is a helper's call that calls its first argument."""
    names = dotted(node.func)
    return names is not None and names[0] == HELPER and names[1] in ("start", "link", "close", "overwrite")


def is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def helper(name: str, at: ast.AST, *arguments: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.expr:
    """A call of ``taylorkern.deferred``'s ``name``, in the place of ``at``."""
    return placed(ast.Call(func=_attribute(name), args=list(arguments), keywords=keywords or []), at)


def _attribute(name: str) -> ast.expr:
    return ast.Attribute(value=ast.Name(id=HELPER, ctx=ast.Load()), attr=name, ctx=ast.Load())


def placed(node: Any, at: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(node, at))


def call_of_one(node: ast.AST) -> ast.Call | None:
    """``node`` if it is f(x), with one argument and no more."""
    plain = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    return node if plain and not isinstance(node.args[0], ast.Starred) else None  # type: ignore[attr-defined, return-value]
