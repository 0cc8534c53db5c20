"""Requests: what is refused before any work."""

import pytest
from support.models.compressed import SHORT, compressed_folder

pytest.importorskip("transformers")

import dbf_compile
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.finetuning.request import default_output


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return compressed_folder(tmp_path_factory.mktemp("request"))


def test_the_usual_output_lies_beside_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_output("a/b/") == tmp_path / "a" / "b-finetuned"
    assert default_output(".") == tmp_path.with_name(f"{tmp_path.name}-finetuned")


def test_a_folder_without_report_needs_the_dense_model(start):
    with pytest.raises(OptionError, match="names none"):
        dbf_compile.finetune(start["folder"], start["data"], **SHORT)


def test_a_dense_folder_is_refused(start):
    with pytest.raises(ConversionError, match="no layer is factored"):
        dbf_compile.finetune(start["dense"], start["data"], dense=start["dense"], **SHORT)


def test_text_is_needed(start):
    with pytest.raises(OptionError, match="no data"):
        dbf_compile.finetune(start["folder"], None, dense=start["dense"], **SHORT)
