"""Generation: new tokens are those that were written, and what cannot be generated is refused before anything runs."""

import pytest
import torch
from support.models.tiny import tiny_bert, tiny_llama

from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.generation import generate

transformers = pytest.importorskip("transformers")
SEQ2SEQ = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
BART = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


class Words:
    """A tokenizer whose words are numbers."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}

    def decode(self, ids, skip_special_tokens=False, **_):
        return "".join(f" {int(number)}" for number in ids if not skip_special_tokens or int(number) > 2)


def bart(**changes):
    torch.manual_seed(0)
    sizes = {**SEQ2SEQ, **BART, "max_position_embeddings": 32, **changes}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {**SEQ2SEQ, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


def llama():
    return tiny_llama().requires_grad_(False)


def run(model, prompt=IDS, **options):
    return generate(model, prompt, tokenizer=Words(), compiled=False, progress=False, **options)


def with_eos(model, token):
    """Let a model end with a token of its own, as one that has learned to."""
    model.generation_config.eos_token_id = token
    return model


@pytest.mark.parametrize("make", [llama, bart, t5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_new_tokens_are_those_that_transformers_writes(make, count):
    model, pieces = make(), []
    generation = run(model, max_new_tokens=count, stream=pieces.append)
    whole = model.generate(IDS, max_new_tokens=count, do_sample=False, num_beams=1)
    start = 1 if model.config.is_encoder_decoder else IDS.shape[1]
    assert generation.new_tokens == whole.shape[1] - start <= count
    assert generation.prompt_tokens == 5
    assert generation.text == Words().decode(whole[0, start:], skip_special_tokens=True)
    assert "".join(pieces) == generation.text


@pytest.mark.parametrize("make", [llama, t5])
def test_a_text_that_ends_early_is_no_longer_than_it_is(make):
    model = make()
    tokens = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:]
    generation = run(with_eos(model, int(tokens[0])), max_new_tokens=6)
    assert generation.new_tokens == 1 and generation.decode_rate == 0


def test_beams_of_a_models_own_settings_are_one():
    model = bart(forced_eos_token_id=None)
    greedy = run(model, max_new_tokens=4)
    model.generation_config.num_beams = 3
    assert run(model, max_new_tokens=4).text == greedy.text


def test_temperature_zero_takes_the_likeliest_token():
    model = llama()
    plain = run(model, max_new_tokens=4)
    for options in ({"temperature": 0}, {"temperature": 0.0, "do_sample": True}):
        assert run(model, max_new_tokens=4, **options).text == plain.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.7, "do_sample": False}, r"temperature=0\.7 without drawing"),
        ({"temperature": -1.0, "do_sample": True}, r"temperature=-1\.0"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature=nan"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"nonsense": 1}, "nonsense"),
        ({"top_k": -3, "do_sample": True}, "top_k"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"shape \[1, 0\]"),
        ({"prompt": IDS.repeat(2, 1)}, r"shape \[2, 5\]"),
        ({"max_new_tokens": 10**6}, "a prompt of 5 tokens and max_new_tokens=1000000"),
        ({"prompt": IDS.repeat(1, 10**4)}, "50000 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_said_in_our_words(options, words):
    with pytest.raises((OptionError, ConversionError), match=words):
        run(llama(), **{"prompt": IDS, "max_new_tokens": 4, **options})


def test_prompt_and_answer_of_an_encoder_decoder_have_positions_of_their_own():
    model = bart(forced_eos_token_id=None)
    long = torch.randint(3, 64, (1, 32), generator=torch.Generator().manual_seed(0))
    assert run(model, long, max_new_tokens=32).prompt_tokens == 32
    with pytest.raises(OptionError, match="the 32 positions of Bart"):
        run(model, long, max_new_tokens=33)


def test_models_that_write_no_text_are_refused():
    with pytest.raises(ConversionError, match="BertModel, which generates no text"):
        run(tiny_bert())
