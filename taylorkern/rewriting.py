"""Rewrites a method's source so that its chains of batch normalisation, addition and activation wait for one another.

Only the chains change: ``v = self.bn(v)`` becomes ``v = start(self.bn, v)``, what follows calls ``link``, ``plus`` and
``close`` (see ``taylorkern.deferred``), in the order in which the code was written. A chain of statements lives in one
variable; any other mention of it ends the chain, and so does code that could tell that the normalisation has not run
yet (see ``taylorkern.spelling``). The new code object keeps its file and line numbers, defaults, globals and closure.
"""

import ast
import copy
from collections.abc import Iterator
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any

from . import deferred
from .sources import HELPER, Dotted, compiled, dotted, source
from .spelling import CALLED, Names, call_of_one, calls_helper, closing, helper, is_sum, opening, placed, quiet, waiting

_SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)
_TRIES = (ast.Try, ast.TryStar)
_LEAVING = (ast.Return, ast.Break, ast.Continue, ast.Raise)
# What binds a name other than by an ast.Name.
_BINDING = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Import,
    ast.ImportFrom,
    ast.Match,
    ast.ExceptHandler,
    ast.Delete,
)
# Contexts of which it is known that no exception ends in them.
_PASSING = {"autocast", "device", "enable_grad", "no_grad", "record_function", "set_grad_enabled", "stream"}


@lru_cache(maxsize=512)
def rewritten(function: FunctionType, name: str, roles: frozenset[tuple[Dotted, str]]) -> FunctionType | None:
    """``function``, to be called ``name``, with its chains fused; None where it holds none. Raises RewriteError.

    ``roles`` says what the attribute chains on the instance are; see :mod:`taylorkern.spelling`.
    """
    found = source(function)
    names, tree = Names(found, dict(roles)), copy.deepcopy(found.tree)
    expressions = _Expressions(names)
    tree.body = [expressions.visit(statement) for statement in tree.body]
    statements = _Statements(names, tree)
    tree.body = statements.block(tree.body, looping=False)
    if not expressions.count + statements.count:
        return None
    code = compiled(function, tree)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[HELPER] = CellType(deferred)
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, name, function.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(made).update(vars(function))
    return made


class _Expressions(ast.NodeTransformer):
    """Chains within one expression: A(B(E)), A(B(E) + R), A(R + B(E)) and the methods ``.relu()`` of these."""

    def __init__(self, names: Names) -> None:
        self.names, self.count = names, 0

    def visit(self, node: ast.AST) -> Any:
        return node if isinstance(node, (*_SCOPES, *_TRIES)) else super().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        closed = closing(self.names, node, lambda inner: opening(self.names, inner))
        self.count += closed is not None
        return node if closed is None else closed


class _Statements:
    """Chains that live in a variable over several statements of one list."""

    def __init__(self, names: Names, tree: ast.FunctionDef) -> None:
        self.names, self.count = names, 0
        self.captured = {
            name.id
            for scope in ast.walk(tree)
            if isinstance(scope, _SCOPES) and scope is not tree
            for name in ast.walk(scope)
            if isinstance(name, ast.Name)
        }
        self.reads: dict[str, list[tuple[int, int]]] = {}
        for name in _reads(tree):
            self.reads.setdefault(name.id, []).append((name.lineno, name.col_offset))

    def block(self, statements: list[ast.stmt], looping: bool) -> list[ast.stmt]:
        statements = [self._nested(statement, looping) for statement in statements]
        i = 0
        while i < len(statements):
            statements = self._followed(statements, i, looping)
            i += 1
        return statements

    def _nested(self, statement: ast.stmt, looping: bool) -> ast.stmt:
        """``statement`` with the chains in its blocks fused; an exception must not carry a promise out of one."""
        if isinstance(statement, (*_SCOPES, *_TRIES)) or (isinstance(statement, ast.With) and not _passes(statement)):
            return statement
        looping = looping or isinstance(statement, (ast.For, ast.While))
        for name in ("body", "orelse"):
            if isinstance(inner := getattr(statement, name, None), list) and inner:
                setattr(statement, name, self.block(inner, looping))
        return statement

    def _followed(self, statements: list[ast.stmt], i: int, looping: bool) -> list[ast.stmt]:
        """``statements`` with the chain that starts at i fused, if one does and is closed."""
        variable, opened = self._opened(statements[i])
        if variable is None or variable in self.captured or variable == self.names.this:
            return statements
        chain = _Chain(self, variable, opened, looping)
        new = [opened]
        for statement in statements[i + 1 :]:
            step = chain.step(statement)
            if step is None:
                break
            new.append(step)
            if chain.ended:
                break
        # Where the variable may be unbound nothing may read it that did not before.
        if not chain.closed or not (chain.ended or _binds(opened, variable)):
            return statements
        self.count += 1
        rest = statements[i + len(new) :]
        if not chain.ended:
            last = helper("value", new[-1], ast.Name(id=chain.variable, ctx=ast.Load()))
            new.append(_assignment(chain.variable, last, new[-1]))
        return [*statements[:i], *new, *rest]

    def _opened(self, statement: ast.stmt) -> tuple[str | None, ast.stmt]:
        """The variable that a chain starts in, and the new statement: of v = B(E), or of an ``if`` that ends so."""
        if isinstance(statement, ast.If):
            return self._opened_in_branches(statement)
        variable = _assigned(statement)
        opened = opening(self.names, statement.value) if variable is not None else None  # type: ignore[attr-defined]
        if variable is None or opened is None:
            return None, statement
        return variable, _assignment(variable, opened, statement)

    def _opened_in_branches(self, statement: ast.If) -> tuple[str | None, ast.stmt]:
        variables, bodies = set(), []
        for body in (statement.body, statement.orelse):
            variable, last = self._opened(body[-1]) if body else (None, None)
            variables.add(variable)
            bodies.append(body if last is None else [*body[:-1], last])
        variables.discard(None)
        if len(variables) != 1:
            return None, statement
        return variables.pop(), placed(ast.If(statement.test, *bodies), statement)


class _Chain:
    """One chain from its start on: what becomes of each statement that comes after."""

    def __init__(self, statements: _Statements, variable: str, first: ast.stmt, looping: bool) -> None:
        self.statements, self.names = statements, statements.names
        self.variable, self.looping = variable, looping
        self.waiting = waiting(first)
        self.bound = _end(first)  # where the variable has got its value: reads before are of the round before
        self.summed = calls_helper(first, "plus")
        self.closed = self.ended = False  # whether an activation may have come, and whether it surely has

    def step(self, statement: ast.stmt) -> ast.stmt | None:
        """The statement with the chain going on through it; None where the tensor itself is needed first."""
        for rule in (self._passed_on, self._in_place_sum, self._closed, self._overwritten):
            new = rule(statement)
            if new is not None:
                return new
        if isinstance(statement, ast.If):
            return self._branch(statement)
        waits = not self._mentioned(statement) and _stays(statement) and self._quiet(statement)
        return statement if waits else None

    def _passed_on(self, statement: ast.stmt) -> ast.stmt | None:
        """v = C(v), v = v + R and v = R + v, also into another variable if v is not needed any more."""
        target = _assigned(statement)
        if target is None or not self._free(target, statement):
            return None
        value = statement.value  # type: ignore[attr-defined]
        call = call_of_one(value)
        if call is not None and self._is_variable(call.args[0]) and self.names.links(call.func):
            new: ast.expr | None = helper("link", call, call.func, call.args[0])
        else:
            new = self._summed(value)
        if new is None:
            return None
        self.summed = self.summed or is_sum(value)
        if target != self.variable:
            self.variable, self.bound = target, _end(statement)
        return _assignment(target, new, statement)

    def _in_place_sum(self, statement: ast.stmt) -> ast.stmt | None:
        if not isinstance(statement, ast.AugAssign) or not isinstance(statement.op, ast.Add):
            return None
        if not self._is_variable(statement.target) or not self._addable(statement.value):
            return None
        variable = ast.Name(id=self.variable, ctx=ast.Load())
        self.summed = True
        new = helper("plus", statement, variable, statement.value, ast.Constant(True))
        return _assignment(self.variable, new, statement)

    def _closed(self, statement: ast.stmt) -> ast.stmt | None:
        """A statement in which the activation is the variable's only reader, and its last."""
        if not isinstance(statement, (ast.Assign, ast.Return)) or statement.value is None:
            return None
        same = _assigned(statement) == self.variable
        elsewhere = [] if same or isinstance(statement, ast.Return) else statement.targets
        if self._mentions(statement.value) != 1 or any(map(self._mentioned, elsewhere)):
            return None
        value = self._with_closing(statement.value)
        if value is None or not (isinstance(statement, ast.Return) or same or self._dead(statement)):
            return None
        self.closed = self.ended = True
        return placed(
            ast.Return(value) if isinstance(statement, ast.Return) else ast.Assign(statement.targets, value), statement
        )

    def _overwritten(self, statement: ast.stmt) -> ast.stmt | None:
        """A bare v.relu_() or F.relu(v, inplace=True) is v = overwrite(…)."""
        if not isinstance(statement, ast.Expr) or self._mentions(statement) != 1:
            return None
        new = closing(self.names, statement.value, lambda node: node if self._is_variable(node) else None, "overwrite")
        if new is None:
            return None
        self.closed = self.ended = True
        return _assignment(self.variable, new, statement)

    def _branch(self, statement: ast.If) -> ast.stmt | None:
        """An ``if`` on something else, through all of whose statements the chain goes on."""
        asks = self.names.role(statement.test) in CALLED or self._quiet(statement.test)
        if not asks or self._mentioned(statement.test):
            return None
        before, bodies, ends = (self.variable, self.bound, self.closed), [], []
        for body in (statement.body, statement.orelse):
            new = self._steps(body)
            if new is None:
                (self.variable, self.bound, self.closed), self.ended = before, False
                return None
            bodies.append(new)
            ends.append(self.ended)
        self.ended = all(ends)
        return placed(ast.If(statement.test, *bodies), statement)

    def _steps(self, body: list[ast.stmt]) -> list[ast.stmt] | None:
        """A branch with the chain going on through it, or ended in it; in the same variable."""
        variable, new, self.ended = self.variable, [], False
        for statement in body:
            step = statement if self.ended else self.step(statement)
            if step is None or self.variable != variable:
                return None
            new.append(step)
        return new

    def _with_closing(self, node: ast.expr) -> ast.expr | None:
        """``node`` with A(v) or A(v + R) in it closed; None where that is not run in any case, or not there."""
        closed = closing(self.names, node, self._opened)
        if closed is not None:
            return closed
        for field in _ALWAYS_RUN.get(type(node), ()):
            inner = getattr(node, field)
            for i, part in enumerate(inner if isinstance(inner, list) else [inner]):
                new = self._with_closing(part)
                if new is not None:
                    changed = copy.copy(node)
                    setattr(changed, field, [*inner[:i], new, *inner[i + 1 :]] if isinstance(inner, list) else new)
                    return changed
                # A function that is looked up first is called last.
                if not (field == "func" and dotted(part)) and not self._quiet(part):
                    return None
        return None

    def _opened(self, node: ast.expr) -> ast.expr | None:
        return node if self._is_variable(node) else self._summed(node)

    def _summed(self, node: ast.expr) -> ast.expr | None:
        """v + R or R + v as plus(…), where R does not mention v."""
        if not isinstance(node, ast.BinOp) or not is_sum(node):
            return None
        sides = (node.left, node.right)
        rest = [side for side in sides if not self._is_variable(side)]
        return helper("plus", node, *sides) if len(rest) == 1 and self._addable(rest[0]) else None

    def _addable(self, node: ast.expr) -> bool:
        return not self._mentioned(node) and self._quiet(node)

    def _quiet(self, node: ast.AST) -> bool:
        """Whether ``node`` can't tell that the normalisation waits, nor change the addend that waits with it."""
        return quiet(self.names, node, self.waiting) and not (self.summed and _may_change(node))

    def _free(self, target: str, statement: ast.stmt) -> bool:
        other = target not in self.statements.captured and target != self.names.this and self._dead(statement)
        return target == self.variable or other

    def _dead(self, statement: ast.stmt) -> bool:
        """Whether nothing reads the variable after ``statement``."""
        reads, end = self.statements.reads.get(self.variable, ()), _end(statement)
        return not any(at >= end or (self.looping and at < self.bound) for at in reads)

    def _mentioned(self, node: ast.AST) -> bool:
        return self._mentions(node) > 0

    def _mentions(self, node: ast.AST) -> int:
        return sum(map(self._is_variable, ast.walk(node)))

    def _is_variable(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.variable


# The fields of an expression whose evaluation does not depend on anything, in the order in which they are run.
_ALWAYS_RUN: dict[type[ast.expr], tuple[str, ...]] = {
    ast.Call: ("func", "args"),
    ast.Attribute: ("value",),
    ast.BinOp: ("left", "right"),
    ast.Tuple: ("elts",),
    ast.List: ("elts",),
}


def _assigned(statement: ast.stmt) -> str | None:
    """v for ``v = …``."""
    single = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    target = statement.targets[0] if single else None  # type: ignore[attr-defined]
    return target.id if isinstance(target, ast.Name) else None


def _assignment(variable: str, value: ast.expr, at: ast.stmt) -> ast.stmt:
    return placed(ast.Assign([ast.Name(id=variable, ctx=ast.Store())], value), at)


def _binds(statement: ast.stmt, variable: str) -> bool:
    """Whether ``variable`` surely has a value after ``statement``."""
    if isinstance(statement, ast.If):
        return all(body and _binds(body[-1], variable) for body in (statement.body, statement.orelse))
    return _assigned(statement) == variable


def _may_change(node: ast.AST) -> bool:
    """Whether ``node`` may write to a tensor."""
    stores = (ast.Call, ast.AugAssign, ast.Subscript)
    return any(isinstance(inner, stores) for inner in ast.walk(node))


def _end(node: ast.stmt) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def _stays(statement: ast.stmt) -> bool:
    """Whether the next statement surely follows, and no name is bound in a way that is not looked at."""
    return not any(isinstance(node, (*_LEAVING, *_BINDING)) for node in ast.walk(statement))


def _passes(statement: ast.With) -> bool:
    """Whether an exception within surely leaves the function."""
    contexts = [item.context_expr for item in statement.items]
    names = [dotted(context.func if isinstance(context, ast.Call) else context) for context in contexts]
    return all(name is not None and name[-1] in _PASSING for name in names)


def _reads(tree: ast.AST) -> Iterator[ast.Name]:
    """Every name where it is read or deleted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target
