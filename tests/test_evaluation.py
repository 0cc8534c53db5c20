"""Figures of a comparison are those that their definitions give."""

import math

import pytest
import torch
from support.models import tiny_bert, tiny_llama
from support.pretrained import text_of, tiny_folder

from dbf_compile.errors import OptionError
from dbf_compile.evaluation import compare, evaluate_folder

transformers = pytest.importorskip("transformers")


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


def test_tasks_go_through_lm_evals_own_call(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    assert lm_eval
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(Exception, match="no_such_task"):
        evaluate_folder(folder, tasks=["no_such_task"], limit=1)
