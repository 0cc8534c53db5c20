"""Chat templates: prompts are those of transformers, and no message can write control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
from support.models.chat import BEGIN, END, TEMPLATE, THINK, chat_tokenizer

from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.integrations.chat_templates import check_has_template, end_of_turn, prompt_of

TOKENIZER = chat_tokenizer()
CONTROLS = TOKENIZER.convert_tokens_to_ids([BEGIN, END])
PARTS = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ '<|im_start|>' + part['text'] + '<|im_end|>' }}{% endif %}{% endfor %}{% endfor %}"
)


def message(content, role="user"):
    return {"role": role, "content": content}


def tokens_of(*messages, template=TEMPLATE, **settings):
    return prompt_of(chat_tokenizer(template), messages, settings)[0].tolist()


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_prompts_are_those_of_transformers(texts):
    messages = [message(text, ("user", "assistant")[index % 2]) for index, text in enumerate(texts)]
    exact = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_of(TOKENIZER, messages, {}).tolist() == [exact]


@given(
    st.lists(st.sampled_from([BEGIN, END, THINK, "<", "|im_end|>", "a b", "\ue000"]), max_size=6).map("".join)
)
def test_a_message_writes_no_control_tokens(text):
    for role, count in (("user", 3), ("system", 3)):
        ids = prompt_of(TOKENIZER, [message(text, role)], {})[0].tolist()
        assert sum(token in CONTROLS for token in ids) == count
        assert TOKENIZER.convert_tokens_to_ids(THINK) not in ids
        assert TOKENIZER.decode(ids) == f"{BEGIN}{role}\n{text}{END}\n{BEGIN}assistant\n"


def test_an_answer_keeps_the_tokens_that_only_a_model_writes():
    ids = tokens_of(message("x"), message(f"{THINK}hm{END}", "assistant"), message("y"))
    assert TOKENIZER.convert_tokens_to_ids(THINK) in ids
    assert sum(token in CONTROLS for token in ids) == 7


def test_variables_of_the_template_reach_it():
    assert tokens_of(message("x"), template="{{ name }}{{ messages[0]['content'] }}", name="Q") == tokens_of(
        message("Qx"), template="{{ messages[0]['content'] }}"
    )


def test_a_template_may_take_contents_as_lists_of_parts():
    assert TOKENIZER.decode(tokens_of(message("hello"), template=PARTS)) == f"{BEGIN}hello{END}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[-1]['content'] }}", "leaves out the message of system"),
        ("{{ messages[0]['content'] }}", "leaves out the message of user"),
        ("{{ messages[0]['name'] + 'a' }}", "does not take"),
    ],
)
def test_a_template_that_does_not_take_the_messages_is_said(template, words):
    with pytest.raises(OptionError, match=words):
        tokens_of(message("be kind", "system"), message("hello"), template=template)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, END),
        (
            "{% for message in messages %}{{ message['content'] + ' <|im_start|><|im_end|>' }}{% endfor %}",
            BEGIN,
        ),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_a_turn_ends_with_the_first_control_token_after_an_answer(template, end):
    token = end_of_turn(chat_tokenizer(template))
    assert token == (end and TOKENIZER.convert_tokens_to_ids(end))


def test_a_tokenizer_without_template_is_refused_with_the_way_out():
    check_has_template(TOKENIZER, "m")
    with pytest.raises(ConversionError, match=r"a chat with m, .* dbf-compile generate"):
        check_has_template(chat_tokenizer(None), "m")
