"""Evaluation: a stated context length, folders and models alike, and tasks of lm-eval."""

import json
from pathlib import Path

import pytest
import torch
from support.models.pretrained import WORDS, text_of, tiny_folder
from support.models.tiny import tiny_llama
from support.reports import report

from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.evaluation import evaluate, evaluate_folder
from dbf_compile.options import EvaluationConfig

transformers = pytest.importorskip("transformers")

from dbf_compile.integrations import pretrained  # noqa: E402


def test_a_folder_is_judged_at_the_stated_context_length(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    found = evaluate_folder(folder, data=text_of(folder), dense=folder, length=32, windows=4)
    assert (
        found["context_length"] == 32 and found["windows"] == 4 and found["kl"] == pytest.approx(0, abs=1e-6)
    )
    assert "124 predictions" in found["measure"]


def test_a_model_is_judged_as_its_folder_is_and_data_may_be_texts(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    options = {"length": 32, "windows": 4}
    expected = evaluate(folder, text_of(folder), dense=folder, **options)
    model, tokenizer = pretrained.open_any(folder), pretrained.tokenizer_of(folder)
    assert evaluate(model, text_of(folder), dense=model, tokenizer=tokenizer, **options) == expected
    assert evaluate(folder, [text_of(folder).read_text()], dense=folder, **options) == expected
    with pytest.raises(OptionError, match="neither data nor tasks"):
        evaluate(folder)
    with pytest.raises(ConversionError, match="a model without a folder"):
        evaluate(model, text_of(folder), **options)


def test_kinds_of_text_are_judged_one_by_one(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    options = {"dense": folder, "length": 32, "windows": 2, "progress": False}
    text = text_of(folder).read_text()
    measured = evaluate(folder, {"web": text_of(folder), "code": [text[500:]]}, **options)
    assert measured["windows"] == 4 and list(measured["kinds"]) == ["web", "code"]
    alone = evaluate(folder, text_of(folder), **options)
    same = ("windows", "kl", "compressed", "perplexity", "top1_agreement")
    assert {name: measured["kinds"]["web"][name] for name in same} == {name: alone[name] for name in same}
    with pytest.raises(ConversionError, match=r"code: 'no such file.txt', which cannot be read"):
        evaluate(folder, {"web": text_of(folder), "code": "no such file.txt"}, **options)


def test_a_report_is_updated_where_there_is_one(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(OptionError, match=r"update_report=True for .* without a report"):
        evaluate(folder, text_of(folder), update_report=True)
    (folder / "dbf_report.json").write_text(json.dumps(report()))
    with pytest.raises(OptionError, match="without data"):
        evaluate(folder, tasks=["piqa"], update_report=True)
    measured = evaluate(folder, {"code": text_of(folder)}, length=32, windows=1, update_report=True)
    assert measured["calibrated_with_one_kind"] == "text.txt"
    kept = json.loads((folder / "dbf_report.json").read_text())["evaluation"]["kinds"]["code"]
    assert kept["compressed"] == measured["kinds"]["code"]["compressed"]


def test_the_callers_model_is_left_as_it_was(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    model, tokenizer = pretrained.open_any(folder), pretrained.tokenizer_of(folder)
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    tensors = {name: (tensor.device, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    evaluate(model, ["some text " * 20], tokenizer=tokenizer, length=16, windows=2, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert {
        name: (tensor.device, tensor.data_ptr()) for name, tensor in model.state_dict().items()
    } == tensors
    with pytest.raises(ConversionError):
        evaluate(model, [3], tokenizer=tokenizer, progress=False)
    assert [module.training for module in model.modules()] == modes


def test_a_model_with_hooks_of_accelerate_is_judged_where_it_lies(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    folder = tiny_folder(tmp_path / "model")
    tokenizer = pretrained.tokenizer_of(folder)
    options = {"tokenizer": tokenizer, "length": 16, "windows": 2, "progress": False}
    expected = evaluate(folder, text_of(folder), **options)
    model = accelerate.disk_offload(pretrained.open_any(folder), str(tmp_path / "weights"), "cpu")
    assert evaluate(model, text_of(folder), **options) == expected


def test_a_length_is_the_users_or_what_the_model_has(tmp_path):
    folder = tiny_folder(tmp_path / "model")  # 128 positions
    assert evaluate(folder, text_of(folder), windows=1, progress=False)["context_length"] == 128
    with pytest.raises(OptionError, match="length=129 for a model of 128 positions"):
        evaluate(folder, text_of(folder), length=129, progress=False)


def test_models_that_cannot_read_the_windows_are_refused(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    options = {"length": 16, "windows": 2, "progress": False}
    with pytest.raises(ConversionError, match="token id of 256; allowed: 0 to 255"):
        evaluate(folder, [{"input_ids": [256] * 20}], **options)
    short = tiny_llama()
    short.resize_token_embeddings(40)
    with pytest.raises(ConversionError, match="allowed: 0 to 39"):
        evaluate(folder, text_of(folder), dense=short, **options)


def test_tasks_without_their_package_say_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"lm-eval.*dbf-compile\[eval\]"):
        evaluate_folder(tiny_folder(tmp_path / "model"), tasks=["piqa"])


def test_lm_eval_is_told_how_many_positions_there_are(monkeypatch, capsys):
    """A stand-in for lm-eval: what it is asked, and what becomes of its assertions."""
    import sys
    from types import SimpleNamespace

    from dbf_compile.integrations.lm_eval import run_tasks

    asked = {}

    def simple_evaluate(model, tasks, limit, **_):
        asked.update(model, tasks=tasks, limit=limit)
        print("a bar", file=sys.stderr)
        assert model["max_length"] > 100, "more tokens than positions"
        return {"results": {"a": {"acc,none": 0.5, "alias": "a"}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=dict))
    settings = EvaluationConfig(tasks=("a",), limit=0.1, progress=False)
    assert run_tasks(None, None, None, settings, 128) == {"a/acc": 0.5}
    assert asked["max_length"] == 128 and asked["limit"] == 0.1 and not capsys.readouterr().err
    with pytest.raises(OptionError, match=r"more tokens than positions.*fit 64 positions"):
        run_tasks(None, None, None, settings, 64)


CHOICES = [" signs", " scale", " twice"]  # of equal length, or the shortest is always the likeliest
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def indexed():
    """lm-eval's index of one of its folders of tasks: reading their thousands of files takes seconds."""
    tasks = pytest.importorskip("lm_eval.tasks")
    own = Path(tasks.__file__).parent
    return tasks.TaskManager(include_path=str(own / "piqa"), include_defaults=False)


@pytest.fixture
def indexed_once(indexed, monkeypatch):
    """lm-eval reads few of its own tasks, once, and beside those of a folder none."""
    from lm_eval.tasks import TaskManager

    def manager(include_path):
        return TaskManager(include_path=include_path, include_defaults=False) if include_path else indexed

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


@pytest.mark.slow
def test_a_task_of_lm_eval_gives_what_its_definition_says(tmp_path, monkeypatch, indexed_once):
    """Accuracy of multiple choice: the choice whose tokens are likeliest after the question."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tiny_folder(tmp_path / "model")
    tokenizer = pretrained.tokenizer_of(folder)
    with monkeypatch.context() as before, pytest.raises(OptionError, match="no end-of-text token"):
        before.setattr(pretrained, "open_any", lambda *_: pytest.fail("a model was loaded"))
        evaluate_folder(folder, tasks=["piqa"])
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(folder)
    model = pretrained.open_any(folder)

    def likelihood(question, choice):
        start = len(tokenizer(question)["input_ids"])
        ids = torch.tensor(tokenizer(question + choice)["input_ids"])
        with torch.no_grad():
            log_chances = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return float(log_chances[range(start - 1, len(ids) - 1), ids[start:]].sum())

    rows, right = [], []
    for count in range(12):
        question, answer = " ".join([*WORDS[:count], "and"]), count % len(CHOICES)
        scores = [likelihood(question, choice) for choice in CHOICES]
        rows.append({"question": question, "choices": CHOICES, "answer": answer})
        right.append(scores.index(max(scores)) == answer)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    found = evaluate_folder(folder, tasks=["local_choices"], include_path=tmp_path / "tasks")
    assert found["local_choices/acc"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)  # else the figure would say little
    first = evaluate_folder(folder, tasks=["local_choices"], include_path=tmp_path / "tasks", limit=1)
    assert first["local_choices/acc"] == right[0]
    share = evaluate_folder(folder, tasks=["local_choices"], include_path=tmp_path / "tasks", limit=0.5)
    assert share["local_choices/acc"] == pytest.approx(sum(right[:6]) / 6)


@pytest.mark.slow
def test_a_task_that_is_not_there_is_named(tmp_path, monkeypatch, indexed_once):
    monkeypatch.setattr(pretrained, "open_any", lambda *_: pytest.fail("a model was loaded"))
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(OptionError, match=r"no_such_task.*include_path"):
        evaluate_folder(folder, tasks=["no_such_task"], limit=1)
