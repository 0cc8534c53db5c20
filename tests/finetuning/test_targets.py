"""What the dense model predicts: kept once, read by all runs, made again where it is damaged."""

import pytest
import torch

pytest.importorskip("transformers")

from support.models.tiny import tiny_llama

from dbf_compile.finetuning import targets as module
from dbf_compile.finetuning.loss import divergence
from dbf_compile.finetuning.targets import Teacher

WINDOWS = torch.arange(1, 25).view(2, 12)
CPU = torch.device("cpu")


def teacher_of(folder, top=8, content="a"):
    calls = []

    def model():
        calls.append(1)
        return dense

    dense = tiny_llama(1)
    return Teacher(model, content, top, folder, CPU), calls, dense


def test_predictions_are_those_of_the_model(tmp_path):
    teacher, _, dense = teacher_of(tmp_path)
    targets = teacher.targets(WINDOWS)
    log_p = torch.log_softmax(dense(WINDOWS).logits, -1).flatten(0, 1)
    best, tokens = log_p.topk(8)
    assert torch.equal(targets.tokens[:, :8], tokens)
    assert torch.allclose(targets.log_p, log_p.gather(-1, targets.tokens), atol=5e-3)  # float16
    assert torch.allclose(targets.weight[:, :8], best.exp(), atol=1e-3)
    assert torch.allclose(targets.weight.sum(-1), torch.ones(24), atol=1e-6)
    logits = dense(WINDOWS).logits.detach().flatten(0, 1)
    assert abs(float(divergence(logits, targets))) / 24 < 2e-3


def test_others_are_drawn_by_their_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DRAWN", 20_000)
    teacher, _, dense = teacher_of(tmp_path)
    targets = teacher.targets(WINDOWS)
    p = torch.softmax(dense(WINDOWS).logits, -1).flatten(0, 1)
    found = torch.zeros_like(p).scatter_add_(-1, targets.tokens, targets.weight)
    assert torch.equal(targets.weight[:, 8:], targets.weight[:, 8:9].expand(-1, 20_000))
    assert torch.allclose(found, p, atol=5e-3)
    drawn = targets.tokens[:, 8:]
    assert not bool((drawn[..., None] == targets.tokens[:, None, :8]).any())
    assert not torch.equal(drawn[0], drawn[1])


def test_a_model_that_is_sure_leaves_nothing_to_others(tmp_path):
    teacher, _, dense = teacher_of(tmp_path)
    with torch.no_grad():
        dense.lm_head.weight.mul_(1e6)
    targets = teacher.targets(WINDOWS)
    sure = targets.weight[:, 8:].sum(-1) == 0
    assert bool(sure.any())
    assert bool(divergence(torch.zeros(24, 256), targets).isfinite())


def test_a_vocabulary_that_is_kept_whole_leaves_no_rest(tmp_path):
    teacher, _, _ = teacher_of(tmp_path, top=1000)
    targets = teacher.targets(WINDOWS)
    assert targets.tokens.shape == (24, 256)
    assert torch.allclose(targets.weight, targets.log_p.exp())


def test_they_are_computed_once(tmp_path):
    teacher, calls, _ = teacher_of(tmp_path)
    first = teacher.targets(WINDOWS)
    again, more_calls, _ = teacher_of(tmp_path)
    second = again.targets(WINDOWS)
    assert len(calls) == len(WINDOWS) and not more_calls
    assert torch.equal(first.log_p, second.log_p) and torch.equal(first.tokens, second.tokens)
    file, _ = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert (
        torch.equal(again.targets(WINDOWS).tokens, first.tokens) and len(more_calls) == 1
    )  # that of one window


@pytest.mark.parametrize("other", [{"top": 4}, {"content": "b"}])
def test_another_model_or_number_of_tokens_is_another_file(tmp_path, other):
    teacher_of(tmp_path)[0].targets(WINDOWS)
    teacher, calls, _ = teacher_of(tmp_path, **other)
    teacher.targets(WINDOWS)
    assert len(calls) == len(WINDOWS)
