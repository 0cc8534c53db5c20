"""Conversations: what the model reads, what is remembered, and what is left out when it has no positions left."""

import pytest

pytest.importorskip("transformers")
from support.models.chat import END, chat_model, chat_tokenizer

from dbf_compile.chat import Conversation
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.generation import TextGenerator

TOKENIZER = chat_tokenizer()


@pytest.fixture(scope="module")
def generator():
    return TextGenerator(chat_model(), tokenizer=TOKENIZER, compiled=False, progress=False)


def text_of(ids):
    return TOKENIZER.decode(ids[0])


def test_a_prompt_has_the_whole_conversation(generator):
    conversation, pieces = Conversation(generator, system="be kind"), []
    answer = conversation.ask("hello", max_new_tokens=4, stream=pieces.append)
    assert answer.text == "".join(pieces) and conversation.cut_off
    assert conversation.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer.text},
    ]
    whole = text_of(conversation.prompt("more"))
    assert whole.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>")
    assert whole.endswith("<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
    conversation.clear()
    assert not conversation.messages and conversation.system == "be kind"


def test_an_answer_is_that_of_the_prompt(generator):
    conversation = Conversation(generator)
    ids = conversation.prompt("hello")
    expected = generator.generate(ids, max_new_tokens=5).text
    assert conversation.ask("hello", max_new_tokens=5).text == expected


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_answer_is_remembered_as_far_as_it_goes(generator, after):
    conversation, pieces = Conversation(generator), []

    def stream(piece):
        if len(pieces) == after:
            raise KeyboardInterrupt
        pieces.append(piece)

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("hello", max_new_tokens=9, stream=stream)
    # The piece at which the interruption came is known to have been generated.
    assert conversation.messages[1]["content"].startswith("".join(pieces))
    assert conversation.ask("hello", max_new_tokens=3).new_tokens == 3


def test_a_message_without_an_answer_is_taken_back(generator):
    conversation = Conversation(generator)
    with pytest.raises(OptionError):
        conversation.ask("hello", max_new_tokens=0)
    with pytest.raises(OptionError, match="nonsense"):
        conversation.ask("hello", max_new_tokens=3, nonsense=1)
    assert not conversation.messages


def test_the_oldest_messages_are_left_out_where_positions_end(generator):
    conversation = Conversation(generator)
    sizes = []
    for number in range(6):
        answer = conversation.ask(f"message {number}", max_new_tokens=20)
        sizes.append((answer.prompt_tokens, conversation.left_out))
        assert answer.prompt_tokens + answer.new_tokens <= 129
    assert sizes[-1][1] > 0 and all(left % 2 == 0 for _, left in sizes)
    assert len(conversation.messages) == 12  # they are left out of prompts alone
    assert "message 0" not in text_of(conversation.prompt("x"))


def test_an_answer_is_as_long_as_there_are_positions(generator):
    conversation = Conversation(generator)
    answer = conversation.ask("m" * 50, max_new_tokens=1000)
    assert answer.prompt_tokens + answer.new_tokens == 129 and conversation.cut_off
    with pytest.raises(OptionError, match=r"a message that makes a prompt of .* the 128 positions"):
        conversation.ask("m" * 130)
    assert conversation.ask("short", max_new_tokens=2).new_tokens == 2


def test_an_answer_ends_where_the_template_ends_a_turn(generator):
    end = TOKENIZER.convert_tokens_to_ids(END)
    settings = generator.model.generation_config
    for known, expected in ((None, [end]), (7, [7, end]), ([7], [7, end]), (end, None), ([end, 7], None)):
        settings.eos_token_id = known
        assert Conversation(generator).endings().get("eos_token_id") == expected
    settings.eos_token_id = None


def test_a_model_without_template_is_refused():
    for tokenizer in (chat_tokenizer(None), None):
        generator = TextGenerator(chat_model(), tokenizer=tokenizer, compiled=False, progress=False)
        with pytest.raises(ConversionError, match=r"has no chat template|without a tokenizer"):
            Conversation(generator)
