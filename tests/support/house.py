"""Sizes of the house: lists every code file and every function that is too long to be read at once.

    python tests/support/house.py

It belongs to ``make check``. The third size, seven parameters a function, is ruff's rule PLR0913.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("dbf_compile", "passes", "kernels", "tests", "benchmarks", "examples", "docs")
FILE_LINES = 400
FUNCTION_LINES = 60

# Braces inside these are no blocks.
_COMMENT_OR_LITERAL = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'""", re.DOTALL)
# What opens a block that holds functions and is none.
_SCOPE = re.compile(r"\b(?:namespace|struct|class|union|enum|extern)\b[^()]*$")
_FUNCTION_NAME = re.compile(r"([\w:~]+)\s*\(")


def code_files(root: Path = ROOT) -> list[Path]:
    """Return all files of Python and C++; a linked folder counts once, under its real name."""
    folders = [root / name for name in FOLDERS if (root / name).is_dir()]
    return sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")
    )


def python_functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first line and number of lines of every function, nested ones too; decorators are not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def cpp_functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first line and number of lines of every outermost block that is not a namespace or a type."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    text = re.sub(
        r"^#.*?(?<!\\)$", blank, _COMMENT_OR_LITERAL.sub(blank, source), flags=re.MULTILINE | re.DOTALL
    )
    name, first, depth, end = "", 0, 0, 0  # depth: of braces inside a function
    for place in re.finditer(r"[{};]", text):
        header, end = text[end : place.start()], place.end()
        if depth:
            depth += {"{": 1, "}": -1, ";": 0}[place[0]]
            if depth == 0:
                yield name, first, text.count("\n", 0, end) + 1 - first + 1
        elif place[0] == "{" and not _SCOPE.search(header):
            depth = 1
            name = match[1] if (match := _FUNCTION_NAME.search(header)) else "{"
            first = text.count("\n", 0, end - 1 - len(header.lstrip())) + 1


def too_long(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield a line of text for a file and each of its functions that has too many lines."""
    source, name = path.read_text(), path.relative_to(root)
    count = len(source.splitlines())
    if count > FILE_LINES:
        yield f"{name}: {count} lines, at most {FILE_LINES} are allowed; split it"
    functions = python_functions if path.suffix == ".py" else cpp_functions
    for function, line, count in functions(source):
        if count > FUNCTION_LINES:
            yield f"{name}:{line}: {function} has {count} lines, at most {FUNCTION_LINES} are allowed; split it"


def main() -> int:
    """Print what is too long; return 1 if anything is."""
    messages = [message for path in code_files() for message in too_long(path)]
    print("\n".join(messages) or f"no file over {FILE_LINES} lines, no function over {FUNCTION_LINES}")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
