"""Requests: what is refused before any work."""

import shutil
from types import SimpleNamespace

import pytest
from support.models.compressed import SHORT, compressed_folder
from support.models.tiny import tiny_llama

pytest.importorskip("transformers")

import dbf_compile
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.finetuning import request
from dbf_compile.finetuning.request import default_output
from dbf_compile.integrations import pretrained
from dbf_compile.options import FinetuneConfig


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return compressed_folder(tmp_path_factory.mktemp("request"))


def test_the_usual_output_lies_beside_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert default_output("a/b/") == tmp_path / "a" / "b-finetuned"
    assert default_output("me/qwen-2bit@main") == tmp_path / "qwen-2bit-finetuned"
    assert default_output(".") == tmp_path.with_name(f"{tmp_path.name}-finetuned")


def test_a_folder_without_report_needs_the_dense_model(start):
    with pytest.raises(OptionError, match="names none"):
        dbf_compile.finetune(start["folder"], start["data"], **SHORT)


def test_a_dense_folder_is_refused(start):
    with pytest.raises(ConversionError, match="no layer is factored"):
        dbf_compile.finetune(start["dense"], start["data"], dense=start["dense"], **SHORT)


def test_a_model_in_memory_is_no_folder(start):
    model = tiny_llama(1)
    for places in ({"folder": model}, {"dense": model}, {"output": 5}):
        with pytest.raises(OptionError, match="in place of a path"):
            dbf_compile.finetune(**{**start, **places}, **SHORT)


def test_text_is_needed(start):
    with pytest.raises(OptionError, match="no data"):
        dbf_compile.finetune(start["folder"], None, dense=start["dense"], own_text=0, **SHORT)


def test_an_output_in_the_folder_itself_is_refused(start):
    with pytest.raises(OptionError, match="the model's own folder"):
        dbf_compile.finetune(**start, output=start["folder"] / "inside", **SHORT)
    assert not (start["folder"] / "inside.work").exists()


def test_a_folder_with_an_adapter_is_refused_before_the_work(start, tmp_path):
    peft = pytest.importorskip("peft")
    model = pretrained.open_any(start["folder"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    folder = shutil.copytree(start["folder"], tmp_path / "both")
    adapted.save_pretrained(folder)
    with pytest.raises(ConversionError, match="an adapter beside its layers"):
        dbf_compile.finetune(folder, start["data"], dense=start["dense"], **SHORT)


def test_a_dense_model_that_was_moved_is_to_be_named(start, monkeypatch):
    facts = SimpleNamespace(model=SimpleNamespace(source="/no/where", hash=None))
    monkeypatch.setattr(request, "read_report", lambda folder: facts)
    with pytest.raises(ConversionError, match=r"as the dense model /no/where, which is not there .*--dense"):
        dbf_compile.finetune(start["folder"], start["data"], **SHORT)


def test_the_tokenizer_of_the_dense_model_serves_where_the_folder_has_none(start, tmp_path):
    none = shutil.copytree(start["folder"], tmp_path / "none", ignore=shutil.ignore_patterns("tokenizer*"))
    config = FinetuneConfig()
    assert request._tokenizer((none, start["dense"]), config, True) is not None
    assert request._tokenizer((none, none), config, False) is None
    with pytest.raises(ConversionError, match="text without a tokenizer"):
        request._tokenizer((none, none), config, True)


def test_a_cache_that_cannot_be_is_refused_and_without_a_home_it_lies_with_the_work(
    start, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "cache")
    with pytest.raises(OptionError, match=r"cache_dir=.* which cannot be made"):
        dbf_compile.finetune(**start, **SHORT, cache_dir=place)
    monkeypatch.setenv("DBF_CACHE_DIR", place)
    assert request._cache_of(FinetuneConfig(), tmp_path / "new") == tmp_path / "new.work"
