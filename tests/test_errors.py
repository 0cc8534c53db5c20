"""What every error says and what it can be caught as."""

from __future__ import annotations

import pickle  # noqa: TID251  errors are pickled, checkpoints are not

import pytest

from dbf_compile import errors
from dbf_compile.errors import DBFError, FactorsError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DBFError)]


@pytest.mark.parametrize("kind", KINDS)
def test_message_says_what_was_got_what_is_allowed_and_what_to_do(kind: type[DBFError]) -> None:
    assert str(kind("a folder", "a file", "pass a file")) == "a folder; allowed: a file; pass a file"


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[DBFError]) -> None:
    # Worker processes send their errors home.
    error = pickle.loads(pickle.dumps(kind("got", "allowed", "do")))
    assert type(error) is kind
    assert (error.got, error.allowed, error.do) == ("got", "allowed", "do")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_caught_by_the_base_and_by_a_builtin(kind: type[DBFError]) -> None:
    assert kind is DBFError or issubclass(kind, (ValueError, RuntimeError))
    assert kind.__name__.endswith("Error")


def test_inside_puts_the_context_in_front_and_keeps_the_kind() -> None:
    error = FactorsError("3 rows", "4 rows", "add one").inside("layer 'up'")
    assert type(error) is FactorsError
    assert str(error) == "layer 'up': 3 rows; allowed: 4 rows; add one"


def test_the_tree_in_the_docstring_is_complete() -> None:
    assert errors.__doc__ is not None
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")}
    assert drawn == {kind.__name__ for kind in KINDS}
