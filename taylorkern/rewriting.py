"""Rewrites a method's source so that its chains of batch normalisation, addition and activation wait for one another.

Only the chains change: ``v = self.bn(v)`` becomes ``v = start(self.bn, v)``, what follows calls ``link``, ``plus`` and
``close`` (see ``taylorkern.deferred``), in the order in which the code was written. A chain of statements lives in one
variable, and any other mention of it ends the chain. The new code object keeps its file and line numbers, defaults,
globals and closure.
"""

import __future__

import ast
import copy
import dis
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from . import deferred

HELPER = "_taylorkern"  # the name under which rewritten code finds ``taylorkern.deferred``
NORM, ACTIVATION, LINK = "norm", "activation", "link"

Dotted = tuple[str, ...]

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
_SUSPENDING = (ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith)
_LEAVING = (ast.Return, ast.Break, ast.Continue, ast.Raise)
_BINDING = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Match, ast.Delete)
_SEES_LOCALS = {"locals", "vars", "dir", "eval", "exec"}


class RewriteError(Exception):
    """Why a function's code must stay as it is."""


@dataclass(frozen=True)
class Source:
    """A method's syntax tree and what it says about itself; raises RewriteError from :func:`source`."""

    function: FunctionType
    tree: ast.FunctionDef
    this: str  # the name of its first parameter

    def dotted(self) -> set[Dotted]:
        """Every attribute chain on the instance, its name left out: ("bn1",), ("block", "norm")."""
        chains = (_dotted(node) for node in ast.walk(self.tree))
        return {chain[1:] for chain in chains if chain is not None and chain[0] == self.this and len(chain) > 1}


@lru_cache(maxsize=512)
def source(function: FunctionType) -> Source:
    """The parsed source of ``function``, if that is surely what runs. Raises RewriteError."""
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(code)
        # Indented code is parsed where it stands, so that its columns and its strings stay as they are.
        indented = lines[0][:1].isspace()
        parsed = ast.parse("".join(["if True:\n", *lines] if indented else lines))
    except (OSError, SyntaxError, TypeError) as error:
        raise RewriteError(f"the source of {code.co_qualname} can't be had") from error
    ast.increment_lineno(parsed, first - 1 - indented)
    tree = parsed.body[0].body[0] if indented else parsed.body[0]  # type: ignore[attr-defined]
    if not isinstance(tree, ast.FunctionDef) or not (tree.args.posonlyargs + tree.args.args):
        raise RewriteError(f"{code.co_qualname} is not a plain method")
    if tree.decorator_list:
        raise RewriteError(f"{code.co_qualname} has a decorator")
    found = Source(function, tree, (tree.args.posonlyargs + tree.args.args)[0].arg)
    _check(found)
    if not _same(_compiled(function, tree), code):
        raise RewriteError(f"the source of {code.co_qualname} is not the code that runs")
    return found


@lru_cache(maxsize=512)
def rewritten(function: FunctionType, roles: frozenset[tuple[Dotted, str]]) -> FunctionType | None:
    """``function`` with its chains fused, or None where it holds none. Raises RewriteError.

    ``roles`` says which attribute chains on the instance are what: ``NORM``, ``ACTIVATION`` or ``LINK``.
    """
    found = source(function)
    names, tree = _Names(found, dict(roles)), copy.deepcopy(found.tree)
    expressions = _Expressions(names)
    tree.body = [expressions.visit(statement) for statement in tree.body]
    statements = _Statements(names, tree)
    tree.body = statements.block(tree.body, looping=False)
    if not expressions.count + statements.count:
        return None
    code = _compiled(function, tree)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[HELPER] = CellType(deferred)
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(made).update(vars(function))
    return made


def _check(found: Source) -> None:
    """Raise RewriteError for code whose variables can't be followed."""
    name = found.function.__code__.co_qualname
    for node in ast.walk(found.tree):
        if isinstance(node, _SUSPENDING):
            raise RewriteError(f"{name} is a generator or a coroutine")
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            raise RewriteError(f"{name} has variables of another scope")
        identifier = getattr(node, "id", getattr(node, "attr", ""))
        if identifier.startswith("__") and not identifier.endswith("__"):
            raise RewriteError(f"{name} uses the private name {identifier}")
        if isinstance(node, ast.Name) and node.id in _SEES_LOCALS:
            raise RewriteError(f"{name} calls {node.id}, which may see its variables")
        if isinstance(node, ast.Name) and node.id == found.this and not isinstance(node.ctx, ast.Load):
            raise RewriteError(f"{name} assigns to {found.this}")


def _compiled(function: FunctionType, tree: ast.FunctionDef) -> CodeType:
    """The code of ``tree`` in the place of ``function``: its file, future imports and free variables."""
    inner = copy.copy(tree)
    inner.args, inner.returns = _bare(tree.args), None
    free = [ast.arg(arg=name) for name in (*function.__code__.co_freevars, HELPER)]
    outer = ast.FunctionDef(
        name="outer",
        args=ast.arguments(posonlyargs=[], args=free, kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=[inner],
        decorator_list=[],
    )
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    futures = function.__code__.co_flags & _FUTURES
    compiled = compile(module, function.__code__.co_filename, "exec", flags=futures, dont_inherit=True)
    (outside,) = (constant for constant in compiled.co_consts if isinstance(constant, CodeType))
    (inside,) = (constant for constant in outside.co_consts if isinstance(constant, CodeType))
    return inside.replace(co_qualname=function.__code__.co_qualname)


_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag


def _bare(args: ast.arguments) -> ast.arguments:
    """The same parameters; defaults and annotations are the function's, not its code's."""
    bare = copy.deepcopy(args)
    for arg in (*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg):
        if arg is not None:
            arg.annotation = None
    bare.defaults = [ast.Constant(None) for _ in bare.defaults]
    bare.kw_defaults = [default and ast.Constant(None) for default in bare.kw_defaults]
    return bare


def _same(a: CodeType, b: CodeType) -> bool:
    """Whether two code objects do the same, wherever they stand."""
    if _instructions(a) != _instructions(b):
        return False
    inner_a, inner_b = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (a, b))
    return all(map(_same, inner_a, inner_b))


def _instructions(code: CodeType) -> list[tuple[str, str]]:
    """What ``code`` does, without what depends on its place: jumps' lengths, and how an import's method is called."""
    steps = []
    for step in dis.get_instructions(code):
        if step.opname in ("PUSH_NULL", "EXTENDED_ARG"):
            continue
        argument = "" if step.opcode in _JUMPS or isinstance(step.argval, CodeType) else step.argrepr
        name = "LOAD_ATTR" if step.opname == "LOAD_METHOD" else step.opname
        steps.append((name, argument.replace("NULL|self", "").replace("NULL", "").strip(" +")))
    return steps


_JUMPS = {*dis.hasjrel, *dis.hasjabs}


def _dotted(node: ast.AST) -> Dotted | None:
    """("F", "relu") for ``F.relu``; None where a node is not names and dots."""
    if isinstance(node, ast.Name):
        return (node.id,)
    before = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return None if before is None else (*before, node.attr)  # type: ignore[attr-defined]


class _Names:
    """What the callables in a function are, as far as can be told before it runs."""

    def __init__(self, found: Source, roles: dict[Dotted, str]) -> None:
        code = found.function.__code__
        self.this, self.roles, self.globals = found.this, roles, found.function.__globals__
        self.own = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}

    def normalises(self, node: ast.AST) -> bool:
        """A normalisation of the instance, or a local callable, of which the call will tell."""
        dotted = _dotted(node)
        local = dotted is not None and len(dotted) == 1 and dotted[0] in self.own and dotted[0] != self.this
        return local or self._role(dotted) == NORM

    def links(self, node: ast.AST) -> bool:
        return self._role(_dotted(node)) == LINK

    def activates(self, node: ast.AST) -> bool:
        dotted = _dotted(node)
        if dotted is None or dotted[0] in self.own:
            return self._role(dotted) == ACTIVATION
        found: Any = self.globals.get(dotted[0])
        for attribute in dotted[1:]:
            found = vars(found).get(attribute) if isinstance(found, (ModuleType, type)) else None
        return isinstance(found, Callable) and is_function(found)  # type: ignore[arg-type]

    def _role(self, dotted: Dotted | None) -> str | None:
        return self.roles.get(dotted[1:]) if dotted is not None and dotted[0] == self.this else None


def is_function(found: Any) -> bool:
    """Whether ``found`` is one of the functions that can close a chain."""
    return any(found is function for function in deferred.FUNCTIONS)


def _helper(name: str, at: ast.AST, *arguments: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.expr:
    """A call of ``taylorkern.deferred``'s ``name``, in the place of ``at``."""
    call = ast.Call(func=_attribute(name), args=list(arguments), keywords=keywords or [])
    return _placed(call, at)


def _attribute(name: str) -> ast.expr:
    return ast.Attribute(value=ast.Name(id=HELPER, ctx=ast.Load()), attr=name, ctx=ast.Load())


def _placed(node: Any, at: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(node, at))


def _call_of_one(node: ast.AST) -> ast.Call | None:
    """``node`` if it is f(x), with one argument and no more."""
    plain = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    return node if plain and not isinstance(node.args[0], ast.Starred) else None  # type: ignore[attr-defined, return-value]


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


class _Expressions(ast.NodeTransformer):
    """Chains within one expression: A(B(E)), A(B(E) + R), A(R + B(E)) and the methods ``.relu()`` of these."""

    def __init__(self, names: _Names) -> None:
        self.names, self.count = names, 0

    def visit(self, node: ast.AST) -> Any:
        return node if isinstance(node, (*_SCOPES, *_TRIES)) else super().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        closed = closing(self.names, node, lambda inner: opening(self.names, inner))
        self.count += closed is not None
        return node if closed is None else closed


def opening(names: _Names, node: ast.expr) -> ast.expr | None:
    """B(E) as start(B, E), and its sum with something as plus(…)."""
    call = _call_of_one(node)
    if call is not None and names.normalises(call.func):
        return _helper("start", call, call.func, call.args[0])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for side in ("left", "right"):
            half = getattr(node, side)
            opened = None if _is_sum(half) else opening(names, half)
            if opened is not None:
                return _helper("plus", node, *(opened if s == side else getattr(node, s) for s in ("left", "right")))
    return None


def closing(names: _Names, node: ast.Call, opened: Callable[[ast.expr], ast.expr | None]) -> ast.expr | None:
    """A(a, inplace=…), a.relu() or a.relu_() as close(A, a), if ``opened`` takes a."""
    method = isinstance(node.func, ast.Attribute) and node.func.attr in deferred.METHODS
    if method and not node.args and not node.keywords:
        assert isinstance(node.func, ast.Attribute)
        a = opened(node.func.value)
        return None if a is None else _helper("close", node, _attribute(node.func.attr), a)
    if len(node.args) != 1 or not names.activates(node.func) or not _only_inplace(node.keywords):
        return None
    a = opened(node.args[0])
    return None if a is None else _helper("close", node, node.func, a, keywords=node.keywords)


def _only_inplace(keywords: list[ast.keyword]) -> bool:
    return all(k.arg == "inplace" and (isinstance(k.value, ast.Constant) or _dotted(k.value)) for k in keywords)


class _Statements:
    """Chains that live in a variable over several statements of one list."""

    def __init__(self, names: _Names, tree: ast.FunctionDef) -> None:
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
        if isinstance(statement, (*_SCOPES, *_TRIES)):
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
        chain = _Chain(self, variable, statements[i], looping)
        new = [opened]
        for statement in statements[i + 1 :]:
            step = chain.step(statement)
            if step is None:
                break
            new.append(step)
            if chain.ended:
                break
        if not chain.closed:
            return statements
        self.count += 1
        rest = statements[i + len(new) :]
        if not chain.ended:
            last = _helper("value", new[-1], ast.Name(id=chain.variable, ctx=ast.Load()))
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
        return variables.pop(), _placed(ast.If(statement.test, *bodies), statement)


class _Chain:
    """One chain from its start on: what becomes of each statement that comes after."""

    def __init__(self, statements: _Statements, variable: str, first: ast.stmt, looping: bool) -> None:
        self.statements, self.names = statements, statements.names
        self.variable, self.looping = variable, looping
        self.began = (first.lineno, first.col_offset)
        self.closed = self.ended = False  # whether an activation may have come, and whether it surely has

    def step(self, statement: ast.stmt) -> ast.stmt | None:
        """The statement with the chain going on through it; None where the tensor itself is needed first."""
        for rule in (self._passed_on, self._in_place_sum, self._closed):
            new = rule(statement)
            if new is not None:
                return new
        if isinstance(statement, ast.If):
            return self._branch(statement)
        return statement if not self._mentioned(statement) and _stays(statement) else None

    def _passed_on(self, statement: ast.stmt) -> ast.stmt | None:
        """v = C(v), v = v + R and v = R + v, also into another variable if v is not needed any more."""
        target = _assigned(statement)
        if target is None or not self._free(target, statement):
            return None
        value = statement.value  # type: ignore[attr-defined]
        call = _call_of_one(value)
        if call is not None and self._is_variable(call.args[0]) and self.names.links(call.func):
            new: ast.expr | None = _helper("link", call, call.func, call.args[0])
        else:
            new = self._summed(value)
        if new is None:
            return None
        self.variable = target
        return _assignment(target, new, statement)

    def _in_place_sum(self, statement: ast.stmt) -> ast.stmt | None:
        plain = isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add)
        if not plain or not self._is_variable(statement.target) or self._mentioned(statement.value):  # type: ignore[attr-defined]
            return None
        assert isinstance(statement, ast.AugAssign)
        variable = ast.Name(id=self.variable, ctx=ast.Load())
        new = _helper("plus", statement, variable, statement.value, ast.Constant(True))
        return _assignment(self.variable, new, statement)

    def _closed(self, statement: ast.stmt) -> ast.stmt | None:
        """A statement in which the activation is the variable's only reader, and its last."""
        if isinstance(statement, ast.Expr):
            return self._closed_in_place(statement)
        if not isinstance(statement, (ast.Assign, ast.Return)) or statement.value is None:
            return None
        if sum(self._is_variable(node) for node in ast.walk(statement.value)) != 1:
            return None
        value = self._with_closing(statement.value)
        last = isinstance(statement, ast.Return) or _assigned(statement) == self.variable or self._dead(statement)
        if value is None or not last:
            return None
        self.closed = self.ended = True
        return _placed(
            ast.Return(value) if isinstance(statement, ast.Return) else ast.Assign(statement.targets, value), statement
        )

    def _closed_in_place(self, statement: ast.Expr) -> ast.stmt | None:
        """A bare v.relu_() or F.relu(v, inplace=True) is v = close(…)."""
        call = statement.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Attribute, ast.Name)):
            return None
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        written = any(isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)
        new = closing(self.names, call, self._opened) if name.endswith("_") or written else None
        if new is None:
            return None
        self.closed = self.ended = True
        return _assignment(self.variable, new, statement)

    def _branch(self, statement: ast.If) -> ast.stmt | None:
        """An ``if`` on something else, through all of whose statements the chain goes on."""
        if self._mentioned(statement.test):
            return None
        before, bodies, ends = (self.variable, self.closed), [], []
        for body in (statement.body, statement.orelse):
            new = self._steps(body)
            if new is None:
                (self.variable, self.closed), self.ended = before, False
                return None
            bodies.append(new)
            ends.append(self.ended)
        self.ended = all(ends)
        return _placed(ast.If(statement.test, *bodies), statement)

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
        if isinstance(node, ast.Call):
            closed = closing(self.names, node, self._opened)
            if closed is not None:
                return closed
        for field in _ALWAYS_RUN.get(type(node), ()):
            inner = getattr(node, field)
            for i, part in enumerate(inner if isinstance(inner, list) else [inner]):
                new = self._with_closing(part) if isinstance(part, ast.expr) else None
                if new is not None:
                    changed = copy.copy(node)
                    parts = [*inner[:i], new, *inner[i + 1 :]] if isinstance(inner, list) else new
                    setattr(changed, field, parts)
                    return changed
        return None

    def _opened(self, node: ast.expr) -> ast.expr | None:
        return node if self._is_variable(node) else self._summed(node)

    def _summed(self, node: ast.expr) -> ast.expr | None:
        """v + R or R + v as plus(…), where R does not mention v."""
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
            return None
        sides = (node.left, node.right)
        one = sum(map(self._is_variable, sides)) == 1
        mentions = sum(self._is_variable(inner) for side in sides for inner in ast.walk(side))
        return _helper("plus", node, *sides) if one and mentions == 1 else None

    def _free(self, target: str, statement: ast.stmt) -> bool:
        other = target not in self.statements.captured and target != self.names.this and self._dead(statement)
        return target == self.variable or other

    def _dead(self, statement: ast.stmt) -> bool:
        """Whether nothing reads the variable after ``statement``."""
        end = (statement.end_lineno or 0, statement.end_col_offset or 0)
        reads = self.statements.reads.get(self.variable, ())
        return not any(at >= end or (self.looping and at < self.began) for at in reads)

    def _mentioned(self, node: ast.AST) -> bool:
        return any(map(self._is_variable, ast.walk(node)))

    def _is_variable(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.variable


# The fields of an expression whose evaluation does not depend on anything.
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
    return _placed(ast.Assign([ast.Name(id=variable, ctx=ast.Store())], value), at)


def _stays(statement: ast.stmt) -> bool:
    """Whether the next statement surely follows, and no name is bound in a way that is not looked at."""
    return not any(isinstance(node, (*_LEAVING, *_BINDING)) for node in ast.walk(statement))


def _reads(tree: ast.AST) -> Iterator[ast.Name]:
    """Every name where it is read or deleted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target
