"""Decoding in our own loop: tokens are those of transformers, alone, in batches, and after what was read before."""

import pytest
import torch
from support.models.tiny import factored, tiny_gpt2, tiny_llama

from dbf_compile.decoding import Decoder
from dbf_compile.generation import TextGenerator
from dbf_compile.integrations.generation_settings import UnsuitedError

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 8, "sliding_window": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 8},
    "Phi": {},
    "Mixtral": {"num_local_experts": 4},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
PROMPTS = [
    torch.randint(1, 97, (1, length), generator=torch.Generator().manual_seed(length))
    for length in (5, 23, 1)
]


class Numbers:
    """A tokenizer whose words are numbers."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" {int(number)}" for number in ids)


def model_of(name):
    torch.manual_seed(0)
    config = getattr(transformers, name + ("TextConfig" if name == "Gemma3" else "Config"))
    kind = getattr(transformers, name + "ForCausalLM")
    model = kind(config(**{**SIZES, **ARCHITECTURES[name]})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than usual, so that no two tokens are about as likely
            parameter.normal_(std=0.2)
    return model


def generator_of(model, **options):
    return TextGenerator(model, tokenizer=Numbers(), compiled=False, progress=False, **options)


def expected(model, prompt, count):
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    return Numbers().decode(ids[0, prompt.shape[1] :])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_transformers_alone_and_together(name):
    model = model_of(name)
    generator = generator_of(model)
    together = generator.generate(PROMPTS, max_new_tokens=12)
    assert generator._decoder is not None
    for prompt, generation in zip(PROMPTS, together, strict=True):
        text = expected(model, prompt, 12)
        assert generation.text == generator.generate(prompt, max_new_tokens=12).text == text


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: factored(tiny_llama())], ids=["gpt2", "factored"])
def test_positions_and_factored_layers(make):
    model = make().eval().requires_grad_(False)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    generator = generator_of(model)
    assert generator.generate(prompt, max_new_tokens=8).text == expected(model, prompt, 8)
    assert generator._decoder is not None


@pytest.mark.parametrize("name", ["GptOss", "Falcon", "Mamba"])
def test_other_models_go_to_transformers(name):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = getattr(transformers, name + "ForCausalLM")(config).eval().requires_grad_(False)
    generator = generator_of(model)
    assert generator.generate(PROMPTS[0], max_new_tokens=4).text == expected(model, PROMPTS[0], 4)
    assert generator._decoder is None


def test_a_known_beginning_is_not_read_again():
    model = model_of("Llama")
    generator = generator_of(model)
    first = generator.generate(PROMPTS[1], max_new_tokens=6)
    answer = torch.tensor([[int(word) for word in first.text.split()]])
    turn = torch.cat([PROMPTS[1], answer, PROMPTS[0]], 1)
    second = generator.generate(turn, max_new_tokens=6)
    assert second.known_tokens == 23 + 5  # the last token of an answer is not read
    assert second.text == expected(model, turn, 6)
    other = turn.clone()
    other[0, 10] += 1
    third = generator.generate(other, max_new_tokens=6)
    assert third.known_tokens == 10 and third.text == expected(model, other, 6)
    again = generator.generate(other, max_new_tokens=6)
    assert again.known_tokens == other.shape[1] - 1 and again.text == third.text


def test_weights_that_change_are_read_anew():
    model = model_of("Llama")
    generator = generator_of(model)
    generator.generate(PROMPTS[1], max_new_tokens=2)
    model.model.layers[0].self_attn.v_proj.weight.neg_()
    second = generator.generate(PROMPTS[1], max_new_tokens=6)
    assert second.known_tokens == 0 and second.text == expected(model, PROMPTS[1], 6)


def test_prompts_across_parts_and_growth_of_the_cache(monkeypatch):
    monkeypatch.setattr("dbf_compile.decoding._PART", 4)
    monkeypatch.setattr("dbf_compile.decoding._MULTIPLE", 8)
    model = model_of("Llama")
    generator = generator_of(model)
    for length in (3, 4, 5, 8, 9, 17):
        prompt = PROMPTS[1][:, :length]
        assert generator.generate(prompt, max_new_tokens=7).text == expected(model, prompt, 7)


def test_an_interruption_leaves_the_generator_usable():
    model = model_of("Llama")
    generator, pieces = generator_of(model), []

    def interrupting(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS[0], max_new_tokens=12, stream=interrupting)
    whole = expected(model, PROMPTS[0], 12)
    assert whole.startswith("".join(pieces)) and len(pieces) == 3
    assert generator.generate(PROMPTS[0], max_new_tokens=12).text == whole


def test_stop_strings_and_ends_of_single_rows():
    model = model_of("Llama")
    generator = generator_of(model)
    words = [expected(model, prompt, 12).split() for prompt in PROMPTS]
    end = int(words[0][3])
    results = generator.generate(PROMPTS, max_new_tokens=12, eos_token_id=end)
    for own, result in zip(words, results, strict=True):
        count = own.index(str(end)) + 1 if str(end) in own else 12
        assert result.text.split() == own[:count] and result.new_tokens == count
    stop = f" {words[1][4]}"
    stopped = generator.generate(PROMPTS[1], max_new_tokens=12, stop=[stop])
    assert stopped.text == "".join(f" {word}" for word in words[1]).partition(stop)[0]


def test_a_model_whose_tensors_change_gets_another_decoder():
    model = model_of("Llama")
    generator = generator_of(model)
    generator.generate(PROMPTS[0], max_new_tokens=3)
    first = generator._decoder
    generator.generate(PROMPTS[1], max_new_tokens=3)
    assert generator._decoder is first
    model.resize_token_embeddings(101)
    assert generator.generate(PROMPTS[0], max_new_tokens=6).text == expected(model, PROMPTS[0], 6)
    assert generator._decoder is not first


@pytest.mark.parametrize("kind", ["token", "part", "rows"])
def test_a_step_that_is_not_compiled_goes_to_transformers(monkeypatch, kind):
    def programs(decoder, asked):
        if asked == kind:
            raise UnsuitedError("no compiler")
        decoder._programs[asked] = None

    monkeypatch.setattr(Decoder, "_program", programs)
    monkeypatch.setattr("dbf_compile.integrations.generate._compilation", lambda model, compiled: {})
    model = model_of("Llama")
    generator = TextGenerator(model, tokenizer=Numbers(), progress=False)
    results = generator.generate(PROMPTS[:2], max_new_tokens=4)
    assert [item.text for item in results] == [expected(model, prompt, 4) for prompt in PROMPTS[:2]]
    assert generator._decoder is None


@pytest.mark.slow
def test_programs_compute_what_the_model_does_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path))
    model = factored(tiny_llama(layers=1)).eval().requires_grad_(False)
    exact = [expected(model, prompt % 90, 6) for prompt in PROMPTS]
    for _ in range(2):
        generator = TextGenerator(model, tokenizer=Numbers(), progress=False)
        results = generator.generate([prompt % 90 for prompt in PROMPTS], max_new_tokens=6)
        assert isinstance(generator._decoder, Decoder)
        assert [item.text for item in results] == exact
        assert generator.generate(PROMPTS[1] % 90, max_new_tokens=6).text == exact[1]
        monkeypatch.setattr("dbf_compile.compiler.ahead_of_time.compile_program", None)  # all are there now
