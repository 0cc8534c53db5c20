"""The house: every module has a place and a test, imports stay light, private names of torch stay in five files."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.house import FILE_LINES, FUNCTION_LINES, ROOT, too_long

import dbf_compile

TESTS = ROOT / "tests"
PACKAGE = ROOT / "dbf_compile"
PACKAGES = (PACKAGE, ROOT / "passes", ROOT / "kernels")

# These folders test the package as a whole, or help the tests.
NOT_MIRRORED = ("end_to_end", "support")
WHOLE_HOUSE = "test_house.py"
# Modules without a test file of their own, and the file under tests/ that checks them: through what calls them.
TESTED_ELSEWHERE = {
    "dbf_compile/doctor": "test_cli.py",
    "dbf_compile/inspection": "test_cli.py",
    "dbf_compile/run/calibration_data": "run/test_own_text.py",
    "dbf_compile/keywords": "test_options.py",
    "dbf_compile/records": "test_options.py",
    "dbf_compile/compiler/ir": "compiler/test_lowerings.py",
    "dbf_compile/compression/cache": "compression/test_jobs.py",
    "dbf_compile/integrations/datasets": "calibration/test_sources.py",
    "dbf_compile/integrations/lm_eval": "test_evaluation.py",
    "dbf_compile/integrations/generate": "test_generation.py",
    **{
        f"dbf_compile/run/{name}": "end_to_end/test_compress.py"
        for name in ("compress", "context", "folder", "independent", "steps")
    },
    "kernels/sign_matmul/triton_common": "kernels/sign_matmul/test_triton_kernel.py",
}

PRIVATE_TORCH_ALLOWED = {
    f"dbf_compile/compiler/{name}.py" for name in ("dynamo", "inductor", "ir", "programs", "registration")
}

# None of these is needed before a model is compiled, compressed or reported on; torch itself imports none of them.
HEAVY = (
    "jinja2",
    "peft",
    "ray",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "triton",
    "typer",
)


def modules() -> list[str]:
    """Return the full names of all modules; packages that hold nothing but a docstring are left out."""
    return [
        info.name
        for info in pkgutil.walk_packages(dbf_compile.__path__, "dbf_compile.")
        if not (info.ispkg and docstring_only(importlib.import_module(info.name)))
    ]


def docstring_only(package) -> bool:
    statements = ast.parse(Path(package.__file__).read_text()).body
    return all(isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) for one in statements)


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yield the path in the tree and the syntax tree of every module; links are not followed."""
    for folder in PACKAGES:
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def ancestors(name: str) -> Iterator[str]:
    """Yield a module's name and the names of the packages around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def layers() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["type"] == "layers")
    return [name.strip() for layer in contract["layers"] for name in layer.replace(":", "|").split("|")]


def test_every_module_has_a_place_in_a_layer():
    placed = set(layers())
    homeless = [name for name in modules() if placed.isdisjoint(ancestors(name))]
    assert not homeless, "add them to a layer in [[tool.importlinter.contracts]] of pyproject.toml"


def module_of(test: Path) -> Path | None:
    """Return the module that ``tests/<path>/test_x[_aspect].py`` belongs to, ``<path>/x``, without an ending."""
    folder = test.parent.relative_to(TESTS)
    home = ROOT if folder.parts[:1] in (("passes",), ("kernels",)) else PACKAGE
    words = test.stem.removeprefix("test_").split("_")
    for count in range(len(words), 0, -1):
        module = home / folder / "_".join(words[:count])
        if any(module.with_suffix(ending).exists() for ending in (".py", ".h", ".cpp")):
            return module
    return None


def mirrored_tests() -> list[Path]:
    tests = sorted(TESTS.rglob("test_*.py"))
    return [
        path
        for path in tests
        if path.relative_to(TESTS).parts[0] not in NOT_MIRRORED and path != TESTS / WHOLE_HOUSE
    ]


def test_every_test_file_belongs_to_a_module():
    strays = [str(path.relative_to(ROOT)) for path in mirrored_tests() if module_of(path) is None]
    assert not strays, "tests/<path>/test_x[_aspect].py tests <path>/x.py: rename or move them"


def test_every_module_has_a_test_file():
    tested = {module_of(path) for path in mirrored_tests()}
    untested = {
        str(path.relative_to(ROOT).with_suffix(""))
        for folder in PACKAGES
        for path in folder.rglob("*.py")
        if path.name != "__init__.py" and path.with_suffix("") not in tested
    }
    assert untested - TESTED_ELSEWHERE.keys() == set(), "add tests/<path>/test_<module>.py"
    assert TESTED_ELSEWHERE.keys() - untested == set(), "these have a test file now, or are gone"
    assert all((TESTS / path).exists() for path in TESTED_ELSEWHERE.values())


def test_no_name_is_both_a_module_and_a_function():
    names = [
        f"{package}.{info.name}"
        for package in ("dbf_compile", *(m.name for m in pkgutil.walk_packages(dbf_compile.__path__, "dbf_compile.") if m.ispkg))
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__)
        if callable(getattr(importlib.import_module(package), info.name, None))
    ]  # fmt: skip
    assert not names


def test_public_names_exist_and_are_sorted():
    assert all(hasattr(dbf_compile, name) for name in dbf_compile.__all__)
    assert sorted(dbf_compile.__all__) == list(dbf_compile.__all__)


def test_importing_the_package_imports_nothing_heavy_and_touches_no_device():
    code = f"""
import sys, torch
import dbf_compile
print([name for name in {HEAVY!r} if name in sys.modules], torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def chain(node: ast.AST) -> list[str]:
    """Return the names of ``a.b[...].c``, outermost first; none for anything else."""
    if isinstance(node, ast.Subscript):
        return chain(node.value)
    if isinstance(node, ast.Attribute):
        left = chain(node.value)
        return [*left, node.attr] if left else []
    return [node.id] if isinstance(node, ast.Name) else []


def torch_names(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the full name of everything of torch that a module imports or reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, [*node.module.split("."), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, chain(node)


def test_private_names_of_torch_stay_in_their_rooms():
    places = [
        f"{path}:{line}: {'.'.join(names)}"
        for path, tree in sources()
        if path not in PRIVATE_TORCH_ALLOWED
        for line, names in torch_names(tree)
        if names[:1] == ["torch"] and any(name.startswith("_") and not name.endswith("__") for name in names)
    ]
    assert not places, f"only these may use them: {', '.join(sorted(PRIVATE_TORCH_ALLOWED))}"


def bound_to_torch(tree: ast.Module) -> set[str]:
    """Return the names by which a module knows torch and what it imports from there."""
    names = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if (source or alias.name).split(".")[0] == "torch":
                    names.add(alias.asname or alias.name.split(".")[0])
    return names


# For models that are none of ours both stay torch's own.
WRAPPED = [
    ["InstructionTranslator", "_throw_if_in_functorch"],  # asked of every frame, and told to no backend
    ["AveragedModel", "update_parameters"],  # asks no parameter whether there is a mean of it
]


def test_nothing_assigns_to_torch_or_its_configuration():
    places = []
    for path, tree in sources():
        names = bound_to_torch(tree)
        for node in ast.walk(tree):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
                changed = [chain(target) for target in targets if not isinstance(target, ast.Name)]
                places += [
                    f"{path}:{node.lineno}"
                    for one in changed
                    if one and one[0] in names and one not in WRAPPED
                ]
            elif isinstance(node, ast.Call) and chain(node.func) == ["setattr"] and chain(node.args[0])[:1]:
                places += [f"{path}:{node.lineno}"] if chain(node.args[0])[0] in names else []
    assert not places, "pass settings for the one compilation, never assign them"


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("long.py", "def function():\n{body}"),
        ("long.cpp", "namespace n {{\nstruct S {{\n  int function(int x) const {{\n{body}  }}\n}};\n}}"),
    ],
)
def test_the_check_of_sizes_names_long_files_and_functions(tmp_path, name, function):
    def messages(lines, behind):
        path = tmp_path / name
        path.write_text(function.format(body="    1;\n" * lines) + "\n" * behind)
        return list(too_long(path, tmp_path))

    around = 1 if name.endswith("py") else 2  # the lines of the function besides its body
    first = 1 if name.endswith("py") else 3
    assert messages(FUNCTION_LINES - around, 0) == []
    (message,) = messages(FUNCTION_LINES - around + 1, 0)
    assert message.startswith(f"{name}:{first}: function has {FUNCTION_LINES + 1} lines")
    (message,) = messages(3, FILE_LINES)
    assert message.startswith(f"{name}: ") and "split it" in message
