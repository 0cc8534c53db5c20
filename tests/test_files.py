"""Where the cache lies."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from dbf_compile.files import cache_folder


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
