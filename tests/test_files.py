"""Where the cache lies, and files that several processes write."""

from __future__ import annotations

import threading
from pathlib import Path

import platformdirs
import pytest

from dbf_compile.errors import OptionError
from dbf_compile.files import cache_folder, one_at_a_time, user_path, write_text


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path / "new"))
    assert cache_folder() == tmp_path / "new"
    assert not cache_folder().exists()  # asking makes nothing


@pytest.mark.parametrize("value", [None, ""])
def test_else_it_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("DBF_CACHE_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("DBF_CACHE_DIR", value)
    assert cache_folder() == Path(platformdirs.user_cache_dir("dbf_compile"))


def test_paths_as_users_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a b") == tmp_path / "a b" and user_path(Path("~")) == tmp_path
    assert user_path("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
    assert user_path("a/~") == Path("a/~") and user_path(".") == Path()
    with pytest.raises(OptionError, match="an empty path"):
        user_path("")


@pytest.mark.parametrize("name", ["n" * 255, "😀" * 63, "é" * 127])
def test_files_of_any_name_are_written_whole(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_at_a_time_and_no_longer_than_it_waits(tmp_path: Path) -> None:
    order: list[str] = []

    def second(seconds: float) -> None:
        with one_at_a_time(tmp_path / "lock", seconds):
            order.append("second")

    with one_at_a_time(tmp_path / "lock", 1):
        impatient = threading.Thread(target=second, args=(0.1,))
        impatient.start()
        impatient.join()
        assert order == ["second"]
        patient = threading.Thread(target=second, args=(30,))
        patient.start()
        order.append("first")
    patient.join()
    assert order == ["second", "first", "second"]


def test_a_lock_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    entered = False
    with one_at_a_time(tmp_path / "file" / "lock", 1):
        entered = True
    assert entered
