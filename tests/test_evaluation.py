"""Figures of a comparison are those that their definitions give."""

import json
import math

import pytest
import torch
from support.models.pretrained import WORDS, text_of, tiny_folder
from support.models.tiny import tiny_bert, tiny_llama

from dbf_compile.calibration.compare import compare
from dbf_compile.errors import OptionError
from dbf_compile.evaluation import evaluate_folder

transformers = pytest.importorskip("transformers")

from dbf_compile.integrations import pretrained  # noqa: E402


def windows(count=3, length=12):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 256, (2, length), generator=generator)} for _ in range(count)]


def test_a_model_compared_with_itself_has_no_distance():
    model = tiny_llama()
    found = compare(model, model, windows())
    assert found["kl"] == pytest.approx(0.0, abs=1e-6) and found["top1_agreement"] == 1.0
    assert found["dense"] == found["compressed"]
    losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in windows()]
    assert found["compressed"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["compressed"]))
    assert "66 predictions" in found["measure"]


def test_distance_is_that_of_the_predictions():
    dense = tiny_llama()
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
        logits = [(dense(**batch).logits, other(**batch).logits) for batch in windows()]
    found = compare(dense, other, windows())
    kl = [
        torch.nn.functional.kl_div(
            y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        for x, y in logits
    ]
    assert found["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    same = torch.cat([(x.argmax(-1) == y.argmax(-1)).flatten() for x, y in logits])
    assert found["top1_agreement"] == pytest.approx(float(same.float().mean()))


def test_encoders_are_compared_by_their_output_and_nothing_is_made_up():
    dense, other = tiny_bert(), tiny_bert()
    with torch.no_grad():
        other.encoder.layer[1].output.LayerNorm.weight.mul_(1.1)
    found = compare(dense, other, windows())
    assert set(found) == {"error", "measure"} and 0 < found["error"] < 0.1
    assert compare(None, dense, windows()) == {}
    assert compare(dense, dense, []) == {}


def test_a_folder_is_judged_at_the_stated_context_length(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    found = evaluate_folder(folder, data=text_of(folder), dense=folder, length=32, windows=4)
    assert (
        found["context_length"] == 32 and found["windows"] == 4 and found["kl"] == pytest.approx(0, abs=1e-6)
    )
    assert "124 predictions" in found["measure"]


def test_tasks_without_their_package_say_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"lm-eval.*dbf-compile\[eval\]"):
        evaluate_folder(tiny_folder(tmp_path / "model"), tasks=["piqa"])


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


@pytest.mark.slow
def test_a_task_of_lm_eval_gives_what_its_definition_says(tmp_path, monkeypatch):
    """Accuracy of multiple choice: the choice whose tokens are likeliest after the question."""
    pytest.importorskip("lm_eval")
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


@pytest.mark.slow
def test_a_task_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(pretrained, "open_any", lambda *_: pytest.fail("a model was loaded"))
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(OptionError, match=r"no_such_task.*include_path"):
        evaluate_folder(folder, tasks=["no_such_task"], limit=1)
