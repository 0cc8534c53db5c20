"""Where models come from: folders, GGUF files, and names on the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from support.models.pretrained import QUICK, as_pickle, tiny_folder

import dbf_compile
from dbf_compile.errors import ConversionError
from dbf_compile.integrations import origins, pretrained


@pytest.fixture(scope="module")
def dense(tmp_path_factory: Any) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def hub(dense: Path, tmp_path: Path, monkeypatch: Any) -> dict[str, Path]:
    """A Hub that holds "some/model": ``downloads`` has one line for every download."""
    from fnmatch import fnmatch

    remote = Path(shutil.copytree(dense, tmp_path / "remote"))
    cache = tmp_path / "cache"
    calls: list[tuple[str, str | None]] = []

    def download(
        name: str, revision: str | None = None, allow_patterns: Any = None, ignore_patterns: Any = ()
    ) -> str:
        calls.append((name, revision))
        if name != "some/model":
            raise OSError("no such name")
        for path in remote.rglob("*"):
            inside = path.relative_to(remote)
            ignored = any(fnmatch(str(inside), pattern) for pattern in ignore_patterns or ())
            allowed = allow_patterns is None or any(fnmatch(str(inside), one) for one in allow_patterns)
            if path.is_file() and allowed and not ignored:
                (cache / inside).parent.mkdir(parents=True, exist_ok=True)
                if not (cache / inside).exists():
                    (cache / inside).symlink_to(path)
        return str(cache)

    monkeypatch.setattr(origins, "snapshot_download", download)
    monkeypatch.setattr(origins.HfApi, "list_repo_files", lambda *_, **__: [])
    return {"remote": remote, "cache": cache, "calls": calls}  # type: ignore[dict-item]


def test_a_name_on_the_hub_is_downloaded_without_other_forms_of_its_weights(hub: Any) -> None:
    for name in (
        "pytorch_model.bin",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "original/params.json",
        "tekken.tiktoken",
    ):
        (hub["remote"] / name).parent.mkdir(exist_ok=True)
        (hub["remote"] / name).write_bytes(b"0")
    folder = pretrained.local_folder("some/model@v2")
    assert hub["calls"] == [("some/model", "v2")]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "tekken.tiktoken"}  # fmt: skip
    pretrained.open_dense(folder)


def test_a_name_without_safetensors_is_downloaded_as_pytorch_has_it(hub: Any) -> None:
    as_pickle(hub["remote"], 2)
    (hub["remote"] / "optimizer.bin").write_bytes(b"0")
    folder = pretrained.local_folder("some/model")
    assert len(hub["calls"]) == 2 and not (folder / "optimizer.bin").exists()
    pretrained.open_dense(folder)


def test_a_name_that_is_nowhere_is_refused(hub: Any) -> None:
    with pytest.raises(ConversionError, match=r"'no/model' .*no such name"):
        pretrained.local_folder("no/model")


def test_links_of_the_cache_are_followed(hub: Any, tmp_path: Path) -> None:
    made = dbf_compile.compress("some/model", tmp_path / "made", **QUICK)
    shutil.rmtree(hub["remote"])
    assert (made.folder / "tokenizer.json").read_text() and not any(
        path.is_symlink() for path in made.folder.iterdir()
    )


def test_several_gguf_files_are_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConversionError, match=r"with 2 GGUF files \(a.gguf, b.gguf\).*name one: .*/a.gguf"):
        origins.local_folder(tmp_path)


def test_a_gguf_file_beside_weights_of_transformers_is_another_form(dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert origins.local_folder(folder) == folder


def test_a_name_with_gguf_files_alone(hub: Any, monkeypatch: Any) -> None:
    (hub["remote"] / "model.safetensors").unlink()
    files, fetched = ["README.md", "m.Q4_0.gguf"], []

    def fetch(name: str, file: str, revision: str | None = None) -> str:
        fetched.append((name, file, revision))
        return file

    monkeypatch.setattr(origins.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(origins, "hf_hub_download", fetch)
    monkeypatch.setattr(origins, "_dequantized", lambda file: file)
    assert origins.local_folder("some/model") == Path("m.Q4_0.gguf")
    assert origins.local_folder("some/model@v2:other.gguf") == Path("other.gguf")
    assert fetched == [("some/model", "m.Q4_0.gguf", None), ("some/model", "other.gguf", "v2")]
    files.append("m.Q8_0.gguf")
    with pytest.raises(ConversionError, match=r"name one: some/model:m.Q4_0.gguf"):
        origins.local_folder("some/model")
