"""Building C++: once per content, whole or not at all, and errors that show what the compiler said."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from dbf_compile.errors import BuildError
from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.cpp_build import build, compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="this machine has no C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A C++ file with one function."""
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n')
    return path


def script(path: Path, lines: str) -> Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


# Copies its source to the place behind -o and counts its calls.
PRETENDER = """
echo called >> "$(dirname "$0")/calls"
while [ "$1" != "-o" ]; do case "$1" in *.cpp) input="$1";; esac; shift; done
cp "$input" "$2"
"""


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a script that stands for the compiler; one line per call."""
    monkeypatch.setenv("CXX", str(script(tmp_path / "pretender", PRETENDER)))
    return tmp_path / "calls"


@needs_compiler
def test_what_is_built_runs(cache: Path, source: Path) -> None:
    library = build(source)
    assert library.parent == cache / "native" and library.name.startswith("answer-")
    assert ctypes.CDLL(str(library)).answer() == 42


@pytest.mark.usefixtures("cache")
def test_nothing_is_built_twice(source: Path, pretender: Path) -> None:
    assert build(source) == build(source)
    assert pretender.read_text().count("called") == 1


@pytest.mark.usefixtures("cache")
def test_a_changed_source_is_another_library(source: Path, pretender: Path) -> None:
    before = build(source)
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 43; }\n')
    after = build(source)
    assert before != after
    assert "42" in before.read_text() and "43" in after.read_text()


@pytest.mark.usefixtures("cache", "pretender")
@pytest.mark.parametrize("what", ["compiler", "torch", "architecture", "flags", "header"])
def test_all_that_decides_is_part_of_the_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = build(source)
    if what == "compiler":
        monkeypatch.setenv("CXX", str(script(tmp_path / "other", PRETENDER)))
    elif what == "torch":
        monkeypatch.setattr(cpp_build.torch, "__version__", "0.0.0")
    elif what == "architecture":
        monkeypatch.setattr(cpp_build.platform, "machine", lambda: "abacus")
    elif what == "header":
        (source.parent / "included.h").write_text("// new\n")
    else:
        monkeypatch.setattr(cpp_build, "FLAGS", ("-O0",))
    assert build(source) != before


@pytest.mark.usefixtures("cache")
def test_the_folder_of_the_source_is_no_part_of_the_name(
    source: Path, tmp_path: Path, pretender: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert build(Path(shutil.copy(source, tmp_path / "elsewhere"))) == build(source)


def test_no_compiler(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert compiler() is None
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(CXX=None\)"):
        build(source)
    assert not cache.exists()


def test_a_compiler_that_is_wanted_but_absent_is_not_replaced(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX='no-such-compiler'"):
        build(source)


@needs_compiler
def test_errors_of_the_compiler_are_shown(cache: Path, source: Path) -> None:
    source.write_text("int answer() { return fortytwo; }\n")
    with pytest.raises(BuildError, match=r"failed on answer\.cpp:\n(.|\n)*fortytwo"):
        build(source)
    assert {path.suffix for path in (cache / "native").iterdir()} == {".lock"}


def test_a_compiler_that_dies_leaves_nothing_behind(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 'while [ "$1" != "-o" ]; do shift; done; echo half > "$2"; echo "out of memory" >&2; exit 1'
    monkeypatch.setenv("CXX", str(script(tmp_path / "dying", half)))
    with pytest.raises(BuildError, match="out of memory"):
        build(source)
    assert {path.suffix for path in (cache / "native").iterdir()} == {".lock"}


def test_only_the_end_of_a_long_output_is_shown(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatter = "i=0; while [ $i -lt 2000 ]; do echo note $i >&2; i=$((i+1)); done; echo the end >&2; exit 1"
    monkeypatch.setenv("CXX", str(script(tmp_path / "chatty", chatter)))
    with pytest.raises(BuildError, match="the end") as caught:
        build(source)
    assert len(str(caught.value)) < 5000


UNWRITABLE = ["occupied", "/proc/nothing", "/dev/full/nothing", "/dev/null"]


@pytest.mark.usefixtures("pretender")
@pytest.mark.parametrize("folder", UNWRITABLE)
def test_where_the_cache_cannot_be_written_a_process_builds_for_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "occupied").write_text("a file where a folder should be")
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path / folder))
    with pytest.warns(UserWarning, match=r"cannot be written: every process builds its C\+\+ kernels"):
        library = build(source)
    assert library.read_text() == source.read_text()
    monkeypatch.setattr(cpp_build.tempfile, "tempdir", "/proc/nothing")
    with pytest.raises(BuildError, match=r"neither .* nor a temporary one can be written.*DBF_CACHE_DIR"):
        build(source)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "sleep 100", "kill -9 $$", "/dev/null"])
def test_a_library_that_was_built_needs_no_compiler(
    source: Path, tmp_path: Path, pretender: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    library = build(source)
    broken = tmp_path / "broken"
    monkeypatch.setenv(
        "CXX", compiler if "/" in compiler or "-such" in compiler else str(script(broken, compiler))
    )
    monkeypatch.setattr(cpp_build, "TIMEOUT_SECONDS", 0.5)
    assert build(source) == library
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 43; }\n')
    with pytest.raises(BuildError):
        build(source)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_library_is_built_again(source: Path, pretender: Path, damage: bytes | None) -> None:
    library = build(source)
    content = library.read_bytes()
    library.write_bytes(content[:9] if damage is None else damage)
    assert build(source).read_bytes() == content
    assert pretender.read_text().count("called") == 2


def test_of_many_builds_at_once_there_is_one(cache: Path, source: Path, pretender: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        libraries = set(pool.map(build, [source] * 16))
    (library,) = libraries
    assert library.read_text() == source.read_text()
    assert list((cache / "native").glob("*[!k]")) == [library]  # beside a lock
    assert pretender.read_text().count("called") == 1


def test_a_builder_that_does_not_end_is_not_waited_for_for_ever(
    cache: Path, source: Path, pretender: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build(source)
    (lock,) = (cache / "native").glob("*.lock")
    library.unlink()
    monkeypatch.setattr(cpp_build, "TIMEOUT_SECONDS", 0.1)
    with FileLock(lock):
        assert build(source) == library and library.exists()


def test_the_library_appears_whole(
    cache: Path, source: Path, pretender: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def watched(partial: Path, library: Path) -> None:
        assert not library.exists()
        assert partial.read_text() == source.read_text()
        assert partial.stat().st_dev == library.parent.stat().st_dev
        replace(partial, library)

    monkeypatch.setattr(Path, "replace", watched)
    assert build(source).exists()
