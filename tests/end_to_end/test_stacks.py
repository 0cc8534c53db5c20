"""Models of several stacks, encoders with decoders and towers of pictures beside text: from a folder and text to an answer."""

import warnings

import pytest
import torch
from support.models.pretrained import FAST, text_of, tiny_folder

import dbf_compile
from dbf_compile.errors import ConversionError

transformers = pytest.importorskip("transformers")

V = 256
SEQ2SEQ = {"vocab_size": V, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
HALVES = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}
TEXT = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 64}
PICTURE = {**TEXT, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2}
del PICTURE["vocab_size"], PICTURE["max_position_embeddings"]
T5 = {**SEQ2SEQ, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
LLAVA = {"text_config": {**TEXT, "model_type": "llama"}, "image_token_id": V - 1}
LLAVA |= {"vision_config": {**PICTURE, "model_type": "clip_vision_model"}}
SPEECH = {**SEQ2SEQ, **HALVES, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
# Model, configuration, and the blocks that text passes, of all blocks.
KINDS = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, (0, 1), 2),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {**SEQ2SEQ, **HALVES, "max_position_embeddings": 64},
        (0, 1),
        2,
    ),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, (2,), 3),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": PICTURE}, (0,), 3),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, (), 2),
}


def folder(name, path):
    kind, config, sizes, *_ = KINDS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    return tiny_folder(path / name, model=model.eval())


def compressed(dense, path, **options):
    """Compress, and return the result and the warnings about blocks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = dbf_compile.compress(dense, path, **FAST | options)
    return result, [str(item.message) for item in caught if "does not pass" in str(item.message)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "marian", "llava", "clip"])
def test_text_is_enough(name, tmp_path):
    dense = folder(name, tmp_path)
    *_, passed, blocks = KINDS[name]
    result, told = compressed(dense, tmp_path / "out", data=text_of(dense), refine=0)
    stages = result.report.stages
    assert sorted({stage.block for stage in stages if stage.block is not None}) == list(passed)
    assert bool(told) == (len(passed) < blocks)
    judged = dbf_compile.evaluate(
        result.folder, text_of(dense), dense=dense, length=16, windows=2, progress=False
    )
    if name == "clip":
        assert judged["error"] < 0.5
        return
    assert judged["kl"] < 0.1 and judged["measure"].startswith("nats a token")
    assert any(stage.stage == "distill" for stage in stages)
    answer = dbf_compile.generate(result.folder, "add the", max_new_tokens=3, compiled=False, progress=False)
    assert 1 <= answer.new_tokens <= 3 and answer.prompt_tokens == 7


@pytest.mark.slow
def test_speech_is_refused_as_text_before_the_work_and_calibrated_with_batches(tmp_path):
    dense = folder("whisper", tmp_path)
    for mode in ("auto", "independent", "sequential"):
        with pytest.raises(ConversionError, match=r"text for Whisper.*input_features.*batches="):
            compressed(dense, tmp_path / "out", data=text_of(dense), mode=mode)
    assert not list(tmp_path.glob("out*"))
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_features": torch.randn(1, 4, 16, generator=generator),
            "decoder_input_ids": torch.randint(3, V, (1, 6), generator=generator),
        }
        for _ in range(5)
    ]
    options = {key: value for key, value in FAST.items() if key not in ("length", "windows")}
    result, told = compressed(dense, tmp_path / "out", batches=batches, **options)
    assert {stage.block for stage in result.report.stages} == {0, 1, None} and not told
    assert result.report.evaluation.kl < 0.1


def test_without_data_what_reads_no_text_is_factored_by_its_weights_and_that_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"nothing is calibrated.*input_features"):
        dbf_compile.compress(
            folder("whisper", tmp_path), tmp_path / "out", bits=4.0, iterations=2, progress=False
        )
