"""A tiny random Llama that takes messages: bytes as tokens, and a template with control tokens."""

from pathlib import Path
from typing import Any

from support.models.pretrained import tiny_tokenizer
from support.models.tiny import tiny_llama

BEGIN, END, THINK = "<|im_start|>", "<|im_end|>", "<think>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Return a tokenizer of bytes with control tokens, and a token that is none, 259 in all."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [BEGIN, END]})
    tokenizer.add_tokens([THINK])
    tokenizer.chat_template = template
    return tokenizer


def chat_model(**sizes: Any) -> Any:
    """Return a model for :func:`chat_tokenizer`, whose answers do not end by themselves."""
    return tiny_llama(**{"vocab_size": 260, "eos_token_id": None, **sizes})


def chat_folder(path: Path, template: str | None = TEMPLATE, **sizes: Any) -> Path:
    """Write model and tokenizer to a folder; return it."""
    chat_model(**sizes).save_pretrained(path)
    chat_tokenizer(template).save_pretrained(path)
    return path
