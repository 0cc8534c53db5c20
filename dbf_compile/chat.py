"""A conversation with a model that follows instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dbf_compile.errors import OptionError
from dbf_compile.generation import Generation, TextGenerator
from dbf_compile.text_model import tokenizer_of


class Conversation:
    """A conversation, message after message, through the chat template of the model.

    Where the model has no positions left, the oldest messages are left out of what it reads, and ``left_out`` counts them.

    Args:
        generator: the model.
        system: what the model is told before the first message; None for what the template says.
        template: further variables of the template, such as ``{"enable_thinking": False}``.

    Attributes:
        messages: "role" and "content" of every message and answer, without ``system``.
        left_out: how many of these the model no longer reads.
        cut_off: whether the last answer ended because it had as many tokens as it may have.

    Raises:
        ConversionError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        generator: TextGenerator,
        *,
        system: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        from dbf_compile.integrations import chat_templates

        if generator.tokenizer is None:
            tokenizer_of(None)
        chat_templates.check_has_template(generator.tokenizer, generator.about.name)
        self.generator, self.system, self.template = generator, system, dict(template or {})
        self.messages: list[dict[str, str]] = []
        self.left_out = 0
        self.cut_off = False

    def ask(
        self,
        message: str,
        *,
        max_new_tokens: int = 512,
        stream: Callable[[str], object] | None = None,
        **options: Any,
    ) -> Generation:
        """Return the answer to a message; both join the conversation.

        An interruption, such as KeyboardInterrupt, leaves in it what was answered so far; without any answer the message is
        taken back.

        Args:
            message: control tokens in it are read as text.
            max_new_tokens: 1 or more; fewer where the model has fewer positions left.
            stream: called with every piece of the answer as it is generated.
            **options: as for :meth:`TextGenerator.generate`.

        Raises:
            OptionError: a message that the model has too few positions for, or an option as for ``generate``.
        """
        ids, room = self._fitting(message, max_new_tokens)
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            if stream is not None:
                stream(piece)

        try:
            answer = self.generator.generate(
                ids, max_new_tokens=room, stream=keep, **self.endings(), **options
            )
        finally:
            if pieces:
                self.messages += [_message("user", message), _message("assistant", "".join(pieces))]
        self.cut_off = answer.new_tokens >= room
        return answer

    def prompt(self, message: str) -> Tensor:
        """Return the tokens that the model would read to answer a message, int64 [1, T]."""
        from dbf_compile.integrations import chat_templates

        system = [] if self.system is None else [_message("system", self.system)]
        messages = [*system, *self.messages[self.left_out :], _message("user", message)]
        return chat_templates.prompt_of(self.generator.tokenizer, messages, self.template)

    def clear(self) -> None:
        """Forget all messages, but not ``system``."""
        self.messages.clear()
        self.left_out = 0

    def endings(self) -> dict[str, Any]:
        """Return an option of ``generate`` with the token that ends a turn, if the model's own settings lack it."""
        from dbf_compile.integrations import chat_templates

        known = getattr(self.generator.about.generation_config, "eos_token_id", None)
        ends = known if isinstance(known, list) else [] if known is None else [known]
        end = chat_templates.end_of_turn(self.generator.tokenizer)
        return {} if end is None or end in ends else {"eos_token_id": [*ends, end]}

    def _fitting(self, message: str, max_new_tokens: int) -> tuple[Tensor, int]:
        """Return the prompt, and how many tokens the answer may have."""
        ids, limit = self.prompt(message), self.generator.about.limits.positions
        if limit is None:
            return ids, max_new_tokens
        # Less than a quarter of the positions is no room for an answer. Then as much is left out at once as makes the rest
        # read again only once in a while: all that comes after what was left out has to be.
        if ids.shape[1] + min(max_new_tokens, limit // 4) > limit:
            while self.left_out < len(self.messages) and ids.shape[1] > limit // 2:
                self.left_out += 2
                ids = self.prompt(message)
        if ids.shape[1] > limit:
            raise OptionError(
                f"a message that makes a prompt of {ids.shape[1]} tokens",
                f"the {limit} positions of {self.generator.about.name}",
                "shorten the message, or the system message",
            )
        # The last token of an answer is not read again.
        return ids, min(max_new_tokens, limit - ids.shape[1] + 1)


def open_conversation(
    model: str | Path,
    *,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    **options: Any,
) -> Conversation:
    """Open a model and begin a conversation; a model without a chat template is refused before its weights are read.

    Args:
        model: its folder, or its name on the Hub.
        system, template: as for :class:`Conversation`.
        **options: as for :class:`~dbf_compile.generation.TextGenerator`.

    Raises:
        ConversionError: the tokenizer has no chat template, or the model generates no text.
    """
    from dbf_compile.integrations import chat_templates, origins

    trust = bool(options.get("trust_remote_code", False))
    tokenizer = tokenizer_of(origins.local_folder(model), trust)
    chat_templates.check_has_template(tokenizer, model)
    return Conversation(
        TextGenerator(model, tokenizer=tokenizer, **options), system=system, template=template
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
