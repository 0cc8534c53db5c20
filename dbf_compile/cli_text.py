"""The commands that write text: ``generate`` and ``chat``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from dbf_compile.cli_options import (
    AsJson,
    Folder,
    as_json_text,
    compared,
    expand_records,
    parse_settings,
    results_alone,
)
from dbf_compile.errors import OptionError
from dbf_compile.options import Sampling
from dbf_compile.progress import say
from dbf_compile.terminal import readable, streamed_text

if TYPE_CHECKING:
    from dbf_compile.generation import Generation, TextGenerator

# Where neither the user nor the model says how to draw: small models repeat themselves without, and wander off at 1.0.
_USUAL_DRAWING = {"temperature": 0.7, "top_p": 0.95}
_DRAWING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Sampling):
    """How text is generated.

    Args:
        system: What the model is told before the first message.
        template: A variable of the chat template as name=JSON, such as enable_thinking=false.
        stop: A text at which to stop; it is not written.
        compiled: Compile decoding.
        device: Where to compute, such as cuda or cpu; None for a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        progress: Say on stderr what goes on, and how fast it went.
    """

    system: str | None = None
    template: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    compiled: bool = True
    device: str | None = None
    trust_remote_code: bool = False
    progress: bool = True

    def opening(self) -> dict[str, Any]:
        """Return the arguments of ``TextGenerator``."""
        names = ("compiled", "device", "trust_remote_code", "progress")
        return {name: getattr(self, name) for name in names}

    def generating(self) -> dict[str, Any]:
        """Return the arguments of ``TextGenerator.generate``."""
        sampling = {item.name: getattr(self, item.name) for item in fields(Sampling)}
        return {"stop": self.stop, **{name: value for name, value in sampling.items() if value is not None}}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ChatOptions):
    """How ``generate`` makes texts.

    Args:
        chat: Answer the prompts, through the chat template of the model, instead of continuing them.
        prompt_file: File with one prompt a line, decoded together; jsonl for a string, or an object with "prompt", a line; - for
            stdin.
    """

    chat: bool = False
    prompt_file: str | None = None


@expand_records
def generate(
    model: Folder,
    options: GenerateOptions,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Text to continue, or several, decoded together; without any, stdin as a whole."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens at most.")] = 64,
    dense: Annotated[str | None, typer.Option(help="Run the dense model beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write text from a model on stdout, then say how many tokens a second prefill and decoding made, and in how much memory."""
    texts, listed = _prompts(prompts or [], options.prompt_file)
    models = compared(model, dense)
    results: dict[str, Any] = {}
    for name in models:
        with results_alone(as_json):
            generator, inputs, more = _opened(name, texts, options)
        settings = {"max_new_tokens": max_new_tokens, **options.generating(), **more}
        began = time.perf_counter()
        if as_json:
            with results_alone(True):
                generations = generator.generate(inputs, **settings)
            rows = [
                {"prompt": text, "text": each.text, **each.summary()}
                for text, each in zip(texts, generations, strict=True)
            ]
            results[name] = rows if listed else rows[0]
            continue
        is_answer = _is_chat(options) or generator.about.answers
        echoes = ["" if is_answer else text for text in texts]
        generations = _written(generator, inputs, settings, _heads(name, echoes, len(models)))
        say(_figures(generations, time.perf_counter() - began), options.progress)
    if as_json:
        print(as_json_text(results))


@expand_records
def chat(
    model: Folder,
    options: ChatOptions,
    max_new_tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=1, help="Tokens of an answer at most.")
    ] = 512,
) -> None:
    """Talk with a model that follows instructions. Where stdin is a pipe, each of its lines is a message."""
    from dbf_compile.chat import open_conversation
    from dbf_compile.console import Console

    conversation = open_conversation(
        model,
        system=None if options.system is None else readable(options.system),
        template=parse_settings(list(options.template)),
        **options.opening(),
    )
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            # It gives input() a history and editing.
            import readline  # noqa: F401
    settings = options.generating()
    own = conversation.generator.about.generation_config.to_diff_dict()
    if settings.get("do_sample", True) and not any(name in settings or name in own for name in _DRAWING):
        settings |= _USUAL_DRAWING
    settings.setdefault("do_sample", True)
    Console(conversation, max_new_tokens=max_new_tokens, progress=options.progress, options=settings).run()


def _prompts(arguments: Sequence[str], file: str | None) -> tuple[list[str], bool]:
    """Return the prompts of a call, and whether the results are a list."""
    if arguments and file is not None:
        raise typer.BadParameter("prompts as arguments and --prompt-file; pass one of them")
    if file is not None:
        return _prompts_of_file(file), True
    if list(arguments) in ([], ["-"]):
        text = "" if sys.stdin.isatty() and not arguments else sys.stdin.read().removesuffix("\n")
        if not text:
            raise typer.BadParameter("a prompt is missing: pass one or more, --prompt-file, or text on stdin")
        return [text], False
    return [readable(text) for text in arguments], len(arguments) > 1


def _prompts_of_file(name: str) -> list[str]:
    """Return the prompts in a file, or on stdin; empty lines are none."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptionError(
            f"prompts in {name} ({error})", "a file of text, in UTF-8", "check the path"
        ) from error
    lines = [line for line in text.splitlines() if line.strip()]
    if name.endswith(".jsonl"):
        lines = [_prompt_of_row(line, f"line {number} of {name}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise OptionError(
            f"{name} without prompts", "one prompt a line", "write some, or pass prompts as arguments"
        )
    return lines


def _prompt_of_row(line: str, place: str) -> str:
    with suppress(ValueError):
        row = json.loads(line)
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if isinstance(prompt, str):
            return prompt
    raise OptionError(
        f"{place}: {line[:60]}", 'a JSON string, or an object with "prompt"', "correct the line"
    )


def _is_chat(options: GenerateOptions) -> bool:
    return options.chat or options.system is not None or bool(options.template)


def _opened(
    name: str, texts: list[str], options: GenerateOptions
) -> tuple[TextGenerator, list[str] | list[Tensor], dict[str, Any]]:
    """Return a model, what it reads, and further arguments of its ``generate``."""
    if not _is_chat(options):
        from dbf_compile.generation import TextGenerator

        return TextGenerator(name, **options.opening()), texts, {}
    from dbf_compile.chat import open_conversation

    system = None if options.system is None else readable(options.system)
    template = parse_settings(list(options.template))
    conversation = open_conversation(name, system=system, template=template, **options.opening())
    return conversation.generator, [conversation.prompt(text) for text in texts], conversation.endings()


def _written(
    generator: TextGenerator, inputs: list[Any], settings: dict[str, Any], heads: list[str]
) -> list[Generation]:
    """Write the texts of one model below their heads: one alone as it is generated, several when all are there."""
    if len(inputs) == 1:
        pending = [heads[0]]

        with streamed_text() as write:
            # The head comes with the first text, below what is said on stderr.
            result = generator.generate(
                inputs[0], stream=lambda piece: write((pending.pop() if pending else "") + piece), **settings
            )
            if pending:
                write(pending.pop())
        return [result]
    results = generator.generate(inputs, **settings)
    for head, result in zip(heads, results, strict=True):
        with streamed_text() as write:
            write(head + result.text)
    return results


def _heads(name: str, echoes: list[str], models: int) -> list[str]:
    """Return what stands before each text: where there are several, the model and the number of the prompt."""
    heads = []
    for number, echo in enumerate(echoes, 1):
        titles = [name] * (models > 1) + [f"prompt {number}"] * (len(echoes) > 1)
        heads.append((f"--- {', '.join(titles)}\n" if titles else "") + echo)
    return heads


def _figures(generations: list[Generation], seconds: float) -> str:
    first = generations[0]
    weights = f"weights {first.weight_bytes / 1e6:.1f} MB, compiled in {first.compile_seconds:.1f} s"
    if len(generations) == 1:
        return f"--- prefill {first.prefill_rate:.1f} tokens/s, decode {first.decode_rate:.1f} tokens/s, {weights}"
    tokens = sum(each.new_tokens for each in generations)
    return f"--- {len(generations)} prompts, {tokens / seconds:.1f} new tokens/s in all, {weights}"
