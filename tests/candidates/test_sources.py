"""Functions are found behind wrappers, properties and hooks, and are known by their syntax trees."""

from __future__ import annotations

import ast
import functools
from typing import Any

from torch import nn

from dbf_compile.candidates.sources import (
    mentions,
    methods,
    own_function,
    parameters,
    parsed,
    plain_functions,
    statements,
)


def wrapped(function: Any) -> Any:
    return functools.wraps(function)(lambda *args: function(*args))


class Base:
    def run(self, x: int) -> int:
        return x

    @property
    def size(self) -> int:
        return 1


class Derived(Base):
    @wrapped
    def run(self, y: int) -> int:
        return super().run(y)

    @functools.cached_property
    def size(self) -> int:  # type: ignore[override]
        return self.other.first

    @staticmethod
    def alone() -> None: ...

    constant = 3


def test_all_versions_of_a_method_are_found_behind_wrappers() -> None:
    assert [parameters(function) for function in methods(Derived, "run", ())] == [
        ("self", "y"),
        ("self", "x"),
    ]
    assert len(methods(Derived, "run", (Base,))) == 1 and len(methods(Derived, "size", ())) == 2
    for name in ("alone", "constant", "absent"):
        assert methods(Derived, name, ()) == []
    (cached, _) = methods(Derived, "size", ())
    assert mentions(cached) >= {"other", "first"}


def test_trees_of_functions_and_lambdas() -> None:
    first, second = lambda a: a + 1, lambda b: -b
    for function, kind in ((first, ast.BinOp), (second, ast.UnaryOp)):
        (body,) = statements(function)
        assert isinstance(body, kind)
    tree = parsed(wrapped)
    assert isinstance(tree, ast.FunctionDef) and tree.name == "wrapped"
    unread = eval("lambda x: x.weight")
    assert parsed(unread) is None and statements(unread) == [] and mentions(unread) == frozenset()


def test_functions_of_torch_and_builtins_are_not_read() -> None:
    assert plain_functions(wrapped(wrapped)) == [wrapped]
    for value in (nn.functional.dropout, len, 3, Derived):
        assert plain_functions(value) == []


def test_what_holds_the_owner_of_a_hook_or_a_forward() -> None:
    owner = Derived()

    def closed(x: int) -> Any:
        return owner, x

    class Hook:
        def __call__(self, module: Any, args: Any) -> None: ...

        def method(self, module: Any) -> None: ...

    def names(value: Any, is_hook: bool = False) -> list[str] | None:
        own = own_function(value, owner, is_hook)
        return None if own is None else own[1]

    assert names(owner.run) == ["self"] and names(closed) == ["owner"] and names(lambda x: x) == []
    assert names(lambda m, args: m, is_hook=True) == ["m"] and names(closed, is_hook=True) == ["x", "owner"]
    assert names(Hook(), is_hook=True) == ["module"] and names(Hook().method, is_hook=True) == ["module"]
    assert names(len) is None
