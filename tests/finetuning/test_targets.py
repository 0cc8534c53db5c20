"""What the dense model predicts: kept once, read by all runs, made again where it is damaged."""

import pytest
import torch

pytest.importorskip("transformers")

from support.models.tiny import tiny_llama

from dbf_compile.finetuning.loss import top_divergence
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
    assert torch.equal(targets.tokens, tokens)
    assert torch.allclose(targets.log_p, best, atol=5e-3)  # float16
    assert torch.allclose(targets.log_p.exp().sum(-1) + targets.rest, torch.ones(24), atol=1e-6)
    assert float(top_divergence(dense(WINDOWS).logits.flatten(0, 1), targets)) / 24 < 1e-5


def test_a_vocabulary_that_is_kept_whole_leaves_no_rest(tmp_path):
    teacher, _, _ = teacher_of(tmp_path, top=1000)
    targets = teacher.targets(WINDOWS)
    assert targets.tokens.shape == (24, 256) and float(targets.rest.max()) == 0


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
    assert torch.equal(again.targets(WINDOWS).rest, first.rest) and len(more_calls) == 1  # that of one window


@pytest.mark.parametrize("other", [{"top": 4}, {"content": "b"}])
def test_another_model_or_number_of_tokens_is_another_file(tmp_path, other):
    teacher_of(tmp_path)[0].targets(WINDOWS)
    teacher, calls, _ = teacher_of(tmp_path, **other)
    teacher.targets(WINDOWS)
    assert len(calls) == len(WINDOWS)
