"""Reads one function for uses of a layer's weight without a call of the layer, and for tests of its class.

    functional.linear(x, self.proj.weight)        a use: this layer must keep its dense weight
    if isinstance(layer, nn.Linear):              a test, which comes out otherwise for a stand-in
    x.to(self.proj.weight.dtype)                  a look, which a stand-in answers
    self.proj(x)                                  a call

A function is read as if all its statements ran. A value is the set of layers, and of weights of layers, that it may be: paths
from ``self``, followed through attributes, containers, loops, local names, methods of the class and functions that are called.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from dbf_compile.candidates.sources import methods, parameters, parsed, plain_functions, statements
from dbf_compile.stand_in import BUILDS, LIKE_ANOTHER, LOOKS, NEW, SAME

Path = tuple[
    str, ...
]  # names of attributes from a module on; CHILD is any child, BELOW the module and all below it
Test = tuple[str, bool]  # the source of a function of ``self``, and what it must return
Uses = dict[
    tuple[Path, frozenset[Test]], str
]  # to what, and where: "whose weight is used without a call in Class.method"

CHILD, BELOW = "*", "**"
# What changes or shows a model, not what it computes. PEFT's forward undoes a merge that nobody can have made.
MAINTENANCE = {"merge", "unmerge", "extra_repr", "reset_parameters", "init_weights", "tie_weights"}
OUTSIDE = (object, nn.Module)  # classes that are not read

_LONGEST_PATH, _DEEPEST_CALL = 6, 4
_VIEWS = SAME | {"T", "mT"}
_HARMLESS = BUILDS | {
    "isinstance",
    "hasattr",
    "type",
    "id",
    "len",
    "is_floating_point",
    "is_complex",
    "numel",
}
_PASS_ON = "list tuple set dict iter next zip enumerate reversed sorted filter map chain"
_ITERATES = set(_PASS_ON.split())
_WALKS = dict.fromkeys(("values", "items", "children", "named_children"), CHILD)
_WALKS |= dict.fromkeys(("modules", "named_modules"), BELOW)
_PARAMETERS = ("parameters", "named_parameters", "state_dict")
_NAMES = (ast.Name, ast.Attribute)
LINEARS = {cls for cls in nn.Linear.__mro__ if cls not in OUTSIDE}
_DECIDABLE = (
    *(ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp),
    *(ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop),
)


class Value(NamedTuple):
    """The layers, and the weights of layers, that an expression may be."""

    layers: frozenset[Path] = frozenset()
    weights: frozenset[Path] = frozenset()

    def __or__(self, other: Value) -> Value:
        return Value(self.layers | other.layers, self.weights | other.weights)

    def then(self, *parts: str) -> Value:
        """Return what lies below the layers."""
        return Value(frozenset((*path, *parts) for path in self.layers if len(path) < _LONGEST_PATH))

    @property
    def items(self) -> Value:
        """What iteration yields: the members of a list of layers, or the children of a container."""
        return self | self.then(CHILD)


NOTHING = Value()
SELF = Value(frozenset({()}))


class Reading:
    """Reads one function.

    Args:
        function: what to read.
        kind: the class of the module that paths start at.
        arguments: values of parameters.
        depth: how many calls lead here.
    """

    def __init__(
        self, function: FunctionType, kind: type, arguments: Mapping[str, Value], depth: int = 0
    ) -> None:
        self.uses: Uses = {}
        self.returned = NOTHING
        self._kind, self._globals, self._depth = kind, function.__globals__, depth
        self._where = function.__qualname__
        self._self = next((name for name, value in arguments.items() if value == SELF), "")
        self._names = dict(arguments)
        self._tests: frozenset[Test] = frozenset()
        for _ in range(2):  # a name may be bound, in a loop, below where it is read
            for node in statements(function):
                self._visit(node)

    def _visit(self, node: ast.AST) -> None:
        """Read a statement, or whatever else holds expressions."""
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value, self._value(value))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, value, self._value(value))
            case ast.For(target=target, iter=iterated) | ast.comprehension(target=target, iter=iterated):
                self._bind(target, None, self._value(iterated).items)
                for child in ast.iter_child_nodes(node):
                    if child is not target and child is not iterated:
                        self._visit(child)
            case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
                self._bind(target, None, self._value(value))
            case ast.If(test=test, body=body, orelse=others):
                self._visit(test)
                for branch, wanted in ((body, True), (others, False)):
                    with self._where_test(test, wanted):
                        for child in branch:
                            self._visit(child)
            case ast.Match(subject=subject, cases=cases):
                matched = self._value(subject)
                for pattern in (inner for case in cases for inner in ast.walk(case.pattern)):
                    if isinstance(pattern, ast.MatchClass) and self._tells_apart(pattern.cls):
                        self._test(matched)
                for child in (child for case in cases for child in (case.guard, *case.body) if child):
                    self._visit(child)
            case ast.Return(value=ast.expr() as value):
                self.returned |= self._value(value)
            case ast.Expr(value=value):
                self._value(value)
            case ast.expr():
                self._use(self._value(node))
            case _:
                for child in ast.iter_child_nodes(node):
                    self._visit(child)

    @contextmanager
    def _where_test(self, test: ast.expr, wanted: bool) -> Iterator[None]:
        """Note, while a branch is read, what must hold of the module's settings for it to run."""
        before = self._tests
        conjunction = wanted and isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)
        parts = test.values if conjunction and isinstance(test, ast.BoolOp) else [test]
        self._tests |= {(self._decidable(part), wanted) for part in parts if self._decidable(part)}
        yield
        self._tests = before

    def _decidable(self, test: ast.expr) -> str:
        """Return the source of an expression of constants and attributes of ``self``; "" for any other."""
        nodes = list(ast.walk(test))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        changing = any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes)
        if names != {self._self} or changing or not all(isinstance(node, _DECIDABLE) for node in nodes):
            return ""
        return f"lambda {self._self}: {ast.unparse(test)}"

    def _bind(self, target: ast.expr, source: ast.expr | None, value: Value) -> None:
        match target, source:
            case ast.Name(id=name), _:
                self._names[name] = self._names.get(name, NOTHING) | value
            case ((ast.Tuple() | ast.List()), ast.Tuple(elts=sources)) if len(target.elts) == len(sources):
                for one, other in zip(target.elts, sources, strict=True):
                    self._bind(one, other, self._value(other))
            case ((ast.Tuple() | ast.List()), _):
                for one in target.elts:
                    self._bind(one, None, value.items)
            case ast.Starred(value=inner), _:
                self._bind(inner, None, value)
            case _:  # into an attribute or a container, from which anybody may read it
                self._use(value)
                self._use(self._value(target))

    def _use(self, value: Value) -> None:
        for path in value.weights:
            self.uses.setdefault((path, self._tests), f"whose weight is used without a call in {self._where}")

    def _test(self, value: Value) -> None:
        """Note that the class of layers is tested, other than that of the module itself."""
        for path in value.layers - SELF.layers:
            self.uses.setdefault((path, self._tests), f"whose class is tested in {self._where}")

    def _tells_apart(self, classes: ast.expr) -> bool:
        """Return whether one of the classes in a test has linear layers and no stand-ins, judged by its name if it is local."""
        if isinstance(classes, ast.Tuple):
            return any(map(self._tells_apart, classes.elts))
        if isinstance(classes, ast.Starred):
            return self._tells_apart(classes.value)
        if isinstance(classes, ast.BinOp):
            return self._tells_apart(classes.left) or self._tells_apart(classes.right)
        try:
            named = eval(ast.unparse(classes), dict(self._globals)) if isinstance(classes, _NAMES) else None
        except Exception:
            named = None
        if named is None:  # a local name
            return "Linear" in ast.unparse(classes)
        return any(kind in LINEARS for kind in (named if isinstance(named, tuple) else (named,)))

    def _value(self, node: ast.expr) -> Value:
        """Return what an expression may be, and note the uses in it."""
        match node:
            case ast.Name(id=name):
                return self._names.get(name, NOTHING)
            case ast.Attribute(value=owner, attr=name):
                return self._attribute(self._value(owner), name)
            case ast.Subscript(value=container, slice=index):
                self._visit(index)
                value = self._value(container)
                self._use(value)
                return value._replace(weights=frozenset()).items
            case ast.Call():
                return self._call(node)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts) | ast.Dict(values=parts):
                return self._union(parts)
            case ast.BoolOp(values=parts):
                return self._union(parts)
            case ast.IfExp(test=test, body=first, orelse=second):
                self._visit(test)
                return self._value(first) | self._value(second)
            case ast.NamedExpr(target=target, value=inner):
                value = self._value(inner)
                self._bind(target, inner, value)
                return value
            case ast.Starred(value=inner) | ast.Await(value=inner) | ast.Lambda(body=inner):
                return self._value(inner)
            case (
                ast.ListComp(elt=inner)
                | ast.SetComp(elt=inner)
                | ast.GeneratorExp(elt=inner)
                | ast.DictComp(value=inner)
            ):
                for generator in node.generators:
                    self._visit(generator)
                return self._value(inner)
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot(), *_], comparators=others):
                self._union([left, *others])
                return NOTHING
            case _:
                for child in ast.iter_child_nodes(node):
                    self._visit(child)
                return NOTHING

    def _union(self, nodes: Iterable[ast.expr]) -> Value:
        value = NOTHING
        for node in nodes:
            value |= self._value(node)
        return value

    def _attribute(self, owner: Value, name: str) -> Value:
        if name not in LOOKS | NEW | _VIEWS:
            self._use(owner)
        if name == "__class__":
            self._test(owner)
        kept = owner.weights if name in _VIEWS else frozenset()
        if name in ("weight", "_parameters"):
            return Value(weights=kept | owner.layers)
        value = owner.then(name)._replace(weights=kept)
        is_property = isinstance(inspect.getattr_static(self._kind, name, None), property)
        if is_property and () in owner.layers:
            value |= self._results(methods(self._kind, name, OUTSIDE), [SELF], {})
        return value

    def _call(self, node: ast.Call) -> Value:
        """Read a call: of a layer, of a method of the class, of a function that is passed layers or weights."""
        arguments = [self._value(argument) for argument in node.args]
        keywords = {keyword.arg or "**": self._value(keyword.value) for keyword in node.keywords}
        passed = NOTHING
        for argument in (*arguments, *keywords.values()):
            passed |= argument
        functions: list[FunctionType] = []
        match node.func:
            case ast.Name(id="getattr") if len(node.args) > 1:
                name = _constant(node.args[1])
                return self._attribute(arguments[0], name) if name else arguments[0].items
            case ast.Name(id="isinstance") if len(node.args) > 1 and self._tells_apart(node.args[1]):
                self._test(arguments[0])
                return NOTHING
            case ast.Name(id="type") if len(arguments) == 1:
                self._test(arguments[0])
                return NOTHING
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in _HARMLESS and not self._receiver(
                node
            ):
                return NOTHING
            case ast.Name(id=name) if name in _ITERATES:
                return passed
            case ast.Name(id=name):
                functions = plain_functions(self._globals.get(name))
            case ast.Attribute(value=ast.Name(id=library), attr=name) if isinstance(
                self._globals.get(library), ModuleType
            ):
                functions = plain_functions(getattr(self._globals[library], name, None))
            case ast.Attribute(value=owner, attr=name):
                receiver = self._value(owner)
                if name in _WALKS:
                    return receiver | receiver.then(_WALKS[name])
                if name in _PARAMETERS:
                    return Value(weights=receiver.then(BELOW).layers)
                if name in ("get_submodule", "get_parameter"):
                    parts = _constant(node.args[0]).split(".") if node.args else [""]
                    below = receiver.then(*parts) if parts != [""] else receiver.then(BELOW)
                    is_weight = name == "get_parameter" and parts[-1] in ("", "weight")
                    return Value(weights=_owners(below)) if is_weight else below
                if name in LIKE_ANOTHER and not receiver.weights:
                    return NOTHING
                self._attribute(receiver, name)
                if () in receiver.layers and name not in MAINTENANCE:
                    functions, arguments = methods(self._kind, name, OUTSIDE), [SELF, *arguments]
            case other:
                self._value(other)
        if functions and self._depth < _DEEPEST_CALL:
            return self._results(functions, arguments, keywords)
        self._use(passed)
        return NOTHING

    def _receiver(self, node: ast.Call) -> bool:
        """Return whether a method is called on a weight."""
        return isinstance(node.func, ast.Attribute) and bool(self._value(node.func.value).weights)

    def _results(
        self, functions: Iterable[FunctionType], arguments: Sequence[Value], keywords: Mapping[str, Value]
    ) -> Value:
        """Read functions that are called here, note their uses, return what they may return."""
        result = NOTHING
        for function in functions:
            bound = {**dict(zip(parameters(function), arguments, strict=False)), **keywords}
            if parsed(function) is None or self._depth >= _DEEPEST_CALL:
                for value in bound.values():
                    self._use(value)
                continue
            known = frozenset((name, value) for name, value in bound.items() if value != NOTHING)
            inner = read(function, self._kind, known, self._depth + 1)
            for (path, tests), where in inner.uses.items():
                self.uses.setdefault((path, tests | self._tests), where)
            result |= inner.returned
        return result


@lru_cache(maxsize=2**13)
def read(
    function: FunctionType, kind: Any, arguments: frozenset[tuple[str, Value]], depth: int = 0
) -> Reading:
    """Return what a function uses and returns, for a class of modules and values of its arguments."""
    return Reading(function, kind, dict(arguments), depth)


def _owners(tensors: Value) -> frozenset[Path]:
    """Return the layers of tensors that are called "weight", or may be."""
    return frozenset(path[:-1] if path[-1] == "weight" else path for path in tensors.layers)


def _constant(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
