"""Places of outputs: what would fail at the end of the work is refused before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dbf_compile.errors import OptionError
from dbf_compile.run.output import check_output, check_place, work_folder
from dbf_compile.run.report import REPORT


@pytest.mark.parametrize(
    "name", ["new", "new/", "sp ace", "é😀", "%20#x", "-", "n" * 250, "😀" * 62, "leads"]
)
def test_places_for_an_output(tmp_path: Path, name: str) -> None:
    (tmp_path / "leads").symlink_to(tmp_path)
    (tmp_path / REPORT).touch()  # whether it is that of the same call is seen later
    work_folder(tmp_path / "new").mkdir()
    check_output(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/where", "whose parent is no folder"),
        ("file/below", "whose parent is no folder"),
        ("file", "which exists"),
        ("folder", "which exists"),
        ("..", "which exists"),
        ("dangling", "a link to .*nowhere, where nothing is"),
        ("a", r"a\.work, where what is done is kept \(it is no folder\)"),
        ("b", r"b\.work, where .* \(it is a link that leads nowhere\)"),
        ("n" * 251, "File name too long"),
        ("😀" * 63, "File name too long"),
    ],
)
def test_places_where_none_can_be(tmp_path: Path, name: str, words: str) -> None:
    for file in ("file", "a.work"):
        (tmp_path / file).touch()
    (tmp_path / "folder").mkdir()
    for link in ("dangling", "b.work"):
        (tmp_path / link).symlink_to("nowhere")
    with pytest.raises(OptionError, match=words):
        check_output(tmp_path / name)


def test_room_is_needed_for_what_is_not_done_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=700))
    check_place(tmp_path / "new", None, 700)
    with pytest.raises(OptionError, match="700 bytes are free; allowed: 1,000 bytes"):
        check_place(tmp_path / "new", None, 1000)
    (work_folder(tmp_path / "new") / "locks").mkdir(parents=True)
    (work_folder(tmp_path / "new") / "state").write_bytes(bytes(400))
    check_place(tmp_path / "new", None, 1000)
    with pytest.raises(OptionError, match="the model's own folder"):
        check_place(tmp_path / "new", tmp_path, 0)
