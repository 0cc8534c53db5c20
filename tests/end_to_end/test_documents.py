"""What the documents say is there: links, snippets, commands, options, messages, pictures and figures."""

from __future__ import annotations

import ast
import csv
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.house import ROOT

import dbf_compile
from dbf_compile import errors
from dbf_compile.cli import app

sys.path.append(str(ROOT / "docs" / "generate"))
import command_tables
import llm_tables
import option_tables
import pass_tables
import pictures
import result_tables

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
MOST_LINES = 120  # of the README
# Pages and pictures of the site that lie elsewhere in the repository: docs/generate/hooks.py brings them in.
FROM_ELSEWHERE = {
    "docs/results/factorizer.md": "benchmarks/results/factorizer.md",
    "docs/results/gpu.md": "benchmarks/results/gpu.md",
    "docs/results/cpu_layer.png": "benchmarks/results/cpu_layer.png",
}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)


def fences(text: str, language: str) -> Iterator[tuple[str, bool]]:
    """Yield the blocks of a language, and whether ``<!-- runs -->`` stands before them."""
    pattern = rf"(<!-- runs -->\n)?^( *)```{language}\n(.*?)^\2```"
    for match in re.finditer(pattern, text, flags=re.DOTALL | re.MULTILINE):
        lines = match[3].splitlines()
        yield "\n".join(line.removeprefix(match[2]) for line in lines), bool(match[1])


def slug(title: str) -> str:
    """Return the anchor of a title, as the site and the forges make it."""
    title = re.sub(r"[`*]", "", title.strip().lower())
    return re.sub(r"[^\w\- ]", "", title).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(title) for title in re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@page
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        relative = target.relative_to(ROOT).as_posix()
        target = ROOT / FROM_ELSEWHERE.get(relative, relative)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@page
def test_named_files_exist(page: Path):
    folders = r"(?:dbf_compile|passes|kernels|tests|benchmarks|docs|examples)"
    for name in re.findall(rf"`({folders}/[\w./-]*)`", page.read_text()):
        assert (ROOT / name).exists(), name


@page
def test_python_compiles_and_its_imports_exist(page: Path):
    for code, _ in fences(page.read_text(), "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dbf_compile":
                assert hasattr(dbf_compile, node.attr), node.attr


@page
def test_dotted_names_exist(page: Path):
    for name in re.findall(r"`(dbf_compile(?:\.\w+)+)", prose(page.read_text())):
        value = dbf_compile
        for index, part in enumerate(parts := name.split(".")[1:]):
            if not hasattr(value, part):
                importlib.import_module("dbf_compile." + ".".join(parts[: index + 1]))
            value = getattr(value, part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [path for path in PAGES if "<!-- runs -->" in path.read_text()], ids=lambda path: path.stem
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for code, runs in fences(page.read_text(), "python"):
        if runs:
            exec(compile(code, page.name, "exec"), {})


@cache
def options_of(command: str) -> set[str]:
    import typer

    parameters = typer.main.get_command(app).commands[command].params
    return {flag for one in parameters for flag in (*one.opts, *one.secondary_opts)}


@page
def test_commands_and_targets_exist(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    lines = [line for code, _ in fences(text, "bash") for line in code.splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", prose(text))]:
        if match := re.search(r"(?:^|\s)dbf-compile (\w+)(.*)", line):
            known = options_of(match[1])
            given = [
                word.partition("=")[0]
                for word in shlex.split(match[2], comments=True)
                if word.startswith("-")
            ]
            assert set(given) <= known, line
        for target in re.findall(r"(?:^|&& )make ([a-z-]+)", line):
            assert target in targets, line
        for script in re.findall(r"python ((?:benchmarks|examples|docs|tests)/\S+\.py)", line):
            assert (ROOT / script).exists(), line


@cache
def messages() -> frozenset[str]:
    """Return every text of the package's sources, with "…" for what is filled in."""
    texts = set()
    for folder in ("dbf_compile", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    texts.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value.replace("%s", "…"))
    return frozenset(texts)


def quoted_messages() -> list[str]:
    text = (ROOT / "docs/reference/troubleshooting.md").read_text()
    return re.findall(r"^#### `(.+)`$", text, re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_that_are_explained_exist(message: str):
    assert any(message in text for text in messages())


def test_every_kind_of_error_is_explained():
    titles = anchors(ROOT / "docs/reference/troubleshooting.md")
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert all(any(title.startswith(kind.lower()) for title in titles) for kind in kinds - {"DBFError"})


def test_every_public_name_has_its_place_in_the_reference():
    text = (ROOT / "docs/reference/api.md").read_text()
    assert sorted(re.findall(r"^::: dbf_compile\.(\w+)$", text, re.MULTILINE)) == sorted(dbf_compile.__all__)


def test_every_command_and_record_has_its_table():
    import typer

    commands = (ROOT / "docs/reference/commands.md").read_text()
    assert set(re.findall(r"generate: command (\w+)", commands)) == set(typer.main.get_command(app).commands)
    options = (ROOT / "docs/reference/options.md").read_text()
    records = {name for name in dbf_compile.__all__ if name.endswith(("Config", "Options", "Sampling"))}
    assert set(re.findall(r"generate: options (\w+)", options)) == records


@pytest.mark.parametrize("record", ["CompressionConfig", "CompressOptions", "CompileOptions"])
def test_tables_of_options_say_something_of_every_field(record: str):
    rows = [line for line in option_tables.table(record).splitlines() if line.startswith("| `")]
    assert rows and all(len(row.split("|")[-2].strip()) > 10 for row in rows)


def test_tables_of_commands_say_something_of_every_option():
    rows = [line for line in command_tables.table("compress").splitlines() if line.startswith("| `")]
    assert len(rows) > 20 and all(len(row.split("|")[-2].strip()) > 5 for row in rows)


def generated() -> list[tuple[str, list[str]]]:
    """Return the calls of generators in the results' pages."""
    calls = []
    for path in (ROOT / "docs/results").glob("*.md"):
        calls += [
            (name, words.split()) for name, words in re.findall(r"generate: (\w+)(.*?) -->", path.read_text())
        ]
    return calls


@pytest.mark.parametrize(("name", "arguments"), generated())
def test_results_can_be_drawn(name: str, arguments: list[str]):
    text = {**result_tables.GENERATORS, **llm_tables.GENERATORS}[name](*arguments)
    heads = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert text and len(heads) <= 1  # every row of a table has as many cells


def test_pictures_are_those_that_the_script_draws():
    for name, draw in pictures.PICTURES.items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == draw(), name


def rows(name: str, **wanted: str) -> dict[str, str]:
    with (ROOT / "benchmarks/results" / f"{name}.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if wanted.items() <= row.items())
    return row


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    text = (ROOT / "README.md").read_text()
    for model, title in (("llama-3.2-1b", "Llama-3.2-1B"), ("qwen3-0.6b", "Qwen3-0.6B")):
        found = [
            rows("cpu_decode", model=model, variant=one)
            for one in ("bf16 inductor", "dbf 2 bit", "dbf 1 bit")
        ]
        cells = [f"{float(row['decode_tokens_per_s']):.1f} ({float(row['model_mb']):.0f})" for row in found]
        assert f"| {title} sizes, decoding, tokens/s (memory, MB) | {' | '.join(cells)} |" in text
    layer = {"shape": "4096x4096", "tokens": "1", "threads": "1"}
    names = ("torch bf16", "dbf 2 bit avx512_vbmi exact", "dbf 1 bit avx512_vbmi exact")
    cells = [f"{float(rows('cpu_layer', contender=name, **layer)['median_us']):.0f}" for name in names]
    assert f"µs | {' | '.join(cells)} |" in text
    losses = [
        rows("compress_python10m", way="block", bits=bits)["nats_lost"] for bits in ("1.9708", "1.0249")
    ]
    assert f"nats a token lost | 0 | {' | '.join(f'{float(loss):.3f}' for loss in losses)} |" in text


def test_the_map_of_the_house_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map")[2].partition("## House rules")[0]
    folder, named = "", set()
    for line in text.splitlines():
        if line.startswith("|") and "`" in line:
            place, modules = line.split("|")[1:3]
            folder = place.strip().strip("`") or folder
            named |= {f"{folder}{name}.py" for name in re.findall(r"`(\w+)`", modules)}
    paths = [path for top in ("dbf_compile", "passes", "kernels") for path in (ROOT / top).rglob("*.py")]
    there = {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}
    linked = ("dbf_compile/passes/", "dbf_compile/kernels/")  # seen under their real names
    assert named == {name for name in there if not name.startswith(linked)}


def test_every_pass_is_described_by_a_sentence():
    text = pass_tables.table("dynamo") + pass_tables.table("inductor")
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__", "graph", "pipeline"}
    assert set(re.findall(r"^\| `(\w+)` \| \w.+ \|$", text, re.MULTILINE)) == files
