"""From a function to its syntax tree, if that is surely what runs, and from a changed tree back to code."""

import __future__

import ast
import bisect
import copy
import dis
import inspect
import tokenize
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

HELPER = "_taylorkern"  # the name under which rewritten code finds ``taylorkern.deferred``

Dotted = tuple[str, ...]

_SUSPENDING = (ast.Yield, ast.YieldFrom, ast.Await, ast.AsyncFor, ast.AsyncWith)
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
        chains = (dotted(node) for node in ast.walk(self.tree))
        return {chain[1:] for chain in chains if chain is not None and chain[0] == self.this and len(chain) > 1}


@lru_cache(maxsize=512)
def source(function: FunctionType) -> Source:
    """The parsed source of ``function``, if that is surely what runs. Raises RewriteError."""
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(code)
        # Indented code is parsed where it stands, so that its columns and its strings stay as they are.
        indented = lines[0][:1].isspace()
        text = "".join(["if True:\n", *lines] if indented else lines)
        parsed = ast.parse(text)
    except (OSError, SyntaxError, TypeError, ValueError, tokenize.TokenError) as error:
        raise RewriteError(f"the source of {code.co_qualname} can't be had") from error
    ast.increment_lineno(parsed, first - 1 - indented)
    tree = parsed.body[0].body[0] if indented else parsed.body[0]  # type: ignore[attr-defined]
    if not isinstance(tree, ast.FunctionDef) or not (tree.args.posonlyargs + tree.args.args):
        raise RewriteError(f"{code.co_qualname} is not a plain method")
    if tree.decorator_list:
        raise RewriteError(f"{code.co_qualname} has a decorator")
    if HELPER in text:
        raise RewriteError(f"{code.co_qualname} uses the name {HELPER}")
    found = Source(function, tree, (tree.args.posonlyargs + tree.args.args)[0].arg)
    _check(found)
    if not _same(compiled(function, tree), code):
        raise RewriteError(f"the source of {code.co_qualname} is not the code that runs")
    return found


def compiled(function: FunctionType, tree: ast.FunctionDef) -> CodeType:
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
    whole = compile(module, function.__code__.co_filename, "exec", flags=futures, dont_inherit=True)
    (outside,) = (constant for constant in whole.co_consts if isinstance(constant, CodeType))
    (inside,) = (constant for constant in outside.co_consts if isinstance(constant, CodeType))
    return inside.replace(co_qualname=function.__code__.co_qualname)


def dotted(node: ast.AST) -> Dotted | None:
    """("F", "relu") for ``F.relu``; None where a node is not names and dots."""
    if isinstance(node, ast.Name):
        return (node.id,)
    before = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return None if before is None else (*before, node.attr)  # type: ignore[attr-defined]


def _check(found: Source) -> None:
    """Raise RewriteError for code whose variables can't be followed."""
    name = found.function.__code__.co_qualname
    if getattr(found.tree, "type_params", None):
        raise RewriteError(f"{name} has type parameters")
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
    if _behaviour(a) != _behaviour(b):
        return False
    inner_a, inner_b = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (a, b))
    return all(map(_same, inner_a, inner_b))


def _behaviour(code: CodeType) -> tuple[list[tuple[str, Any]], list[tuple[Any, ...]]]:
    """What ``code`` does, and where which of its exceptions go, in steps counted without what depends on its place.

    Left out is how an import's method is called, and what long jumps and arguments take more.
    """
    bytecode = dis.Bytecode(code)
    steps = [step for step in bytecode if step.opname not in ("PUSH_NULL", "EXTENDED_ARG")]
    starts = [step.offset for step in steps]

    def at(offset: int) -> int:
        return bisect.bisect_left(starts, offset)

    entries = bytecode.exception_entries  # type: ignore[attr-defined]
    handlers = [(at(e.start), at(e.end), at(e.target), e.depth, e.lasti) for e in entries]
    behaviour = [(_operation(step), at(step.argval) if step.opcode in _JUMPS else _argument(step)) for step in steps]
    return behaviour, handlers


def _operation(step: dis.Instruction) -> str:
    return "LOAD_ATTR" if step.opname == "LOAD_METHOD" else step.opname


def _argument(step: dis.Instruction) -> str:
    if isinstance(step.argval, CodeType):
        return ""
    return step.argrepr.replace("NULL|self", "").replace("NULL", "").strip(" +")


_JUMPS = {*dis.hasjrel, *dis.hasjabs}
