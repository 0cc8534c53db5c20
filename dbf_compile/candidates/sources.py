"""The functions of a class, as syntax trees: all versions of a method, and what a function mentions."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import lru_cache
from types import CodeType, FunctionType, MethodType
from typing import Any

Tree = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_TREES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def parsed(function: FunctionType) -> Tree | None:
    """Return the syntax tree of a function, or None where there is no source."""
    return _tree(function.__code__)


@lru_cache(maxsize=2**13)  # by code: hooks of many layers are closures of one
def _tree(code: CodeType) -> Tree | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    nodes = [node for node in ast.walk(tree) if isinstance(node, _TREES)]
    # Several lambdas may stand in one line.
    names = code.co_varnames[: code.co_argcount]
    return next((node for node in nodes if _names(node) == names), next(iter(nodes), None))


def _names(tree: Tree) -> tuple[str, ...]:
    return tuple(argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args))


def statements(function: FunctionType) -> list[ast.AST]:
    """Return the body of a function; empty where there is no source."""
    tree = parsed(function)
    if tree is None:
        return []
    return [tree.body] if isinstance(tree, ast.Lambda) else list(tree.body)


def parameters(function: FunctionType) -> tuple[str, ...]:
    """Return the names of the positional parameters."""
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def methods(kind: type, name: str, outside: Collection[type]) -> list[FunctionType]:
    """Return all versions of a method, property or the like that a class and its bases define.

    Args:
        kind: the class.
        name: of the method.
        outside: bases that are left out.
    """
    members = [vars(cls)[name] for cls in kind.__mro__ if cls not in outside and name in vars(cls)]
    inner = [getattr(member, "fget", None) or getattr(member, "func", member) for member in members]
    return [
        function
        for member in inner
        if callable(member)
        and not isinstance(member, (staticmethod, classmethod))
        and isinstance(function := inspect.unwrap(member), FunctionType)
    ]


def plain_functions(value: object) -> list[FunctionType]:
    """Return a list of the function that ``value`` is; empty for anything else, and for torch's own functions."""
    if not callable(value):
        return []
    function = inspect.unwrap(value)
    if isinstance(function, FunctionType) and not (function.__module__ or "").startswith("torch."):
        return [function]
    return []


def own_function(value: Any, owner: object, is_hook: bool = False) -> tuple[FunctionType, list[str]] | None:
    """Return the function behind a callable that one object has, and which of its names hold that object.

    Args:
        value: a function, a method, or an object with ``__call__``.
        owner: the object.
        is_hook: it is called with ``owner`` as first argument, after its own ``self``.
    """
    value = value if isinstance(value, MethodType) else inspect.unwrap(value)
    if not isinstance(value, (FunctionType, MethodType)):
        value = getattr(value, "__call__", None)  # noqa: B004  the method, not whether there is one
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, FunctionType):
        return None
    bound_to = getattr(value, "__self__", None)
    own = [0] if bound_to is owner else [int(bound_to is not None)] if is_hook else []
    held = [parameters(function)[place] for place in own if place < len(parameters(function))]
    with suppress(ValueError):  # a name that is bound later
        held += [name for name, value in inspect.getclosurevars(function).nonlocals.items() if value is owner]
    return function, held


@lru_cache(maxsize=2**13)
def mentions(function: FunctionType) -> frozenset[str]:
    """Return the names of all attributes that a function reads, of whatever object."""
    tree = parsed(function)
    nodes: Iterable[ast.AST] = () if tree is None else ast.walk(tree)
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))
