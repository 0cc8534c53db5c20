"""Generation of text with compiled decoding, and its speed and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.limits import Limits, positions_of
from dbf_compile.calibration.model_io import (
    check_reads_tokens,
    is_encoder_decoder,
    predicts_tokens,
    vocabulary_of,
)
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.machine import chosen_device
from dbf_compile.progress import over, say


@dataclass(frozen=True)
class Generation:
    """Generated text, and the time and memory it took.

    Attributes:
        text: the text after the prompt.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens of the text.
        prefill_seconds: time until the first new token.
        decode_seconds: time for the new tokens after the first.
        compile_seconds: time to compile, before all that; once for a model and its shapes.
        weight_bytes: bytes of parameters and buffers; tensors that layers share count once.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    weight_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens a second."""
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        """Return the figures, without the text."""
        figures = {key: value for key, value in asdict(self).items() if key != "text"}
        return {**figures, "prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


def generate(
    model: nn.Module | str | Path,
    prompt: str | Tensor,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    stream: Callable[[str], object] | None = None,
    compiled: bool = True,
    device: torch.device | str | None = None,
    **options: Any,
) -> Generation:
    """Generate text with a static cache and compiled decoding: the backend "dbf" for compressed models, else Inductor's.

    An encoder-decoder reads the prompt and writes an answer; decoder-only models continue it. There is one beam, whatever
    the generation settings of the model say.

    Args:
        model: a model of transformers, its folder, or its name on the Hub.
        prompt: the text to continue, or its token ids, int64 [1, T].
        tokenizer: of the model; None for that of its folder.
        max_new_tokens: 1 or more.
        stream: called with every piece of text as it is generated.
        compiled: False to run eagerly.
        device: where to compute; None for a GPU if there is one.
        **options: further arguments of ``model.generate``, such as ``do_sample`` and ``temperature``; with
            ``trust_remote_code=True`` code that comes with the model is run; with ``progress=False`` nothing is said on stderr.

    Returns:
        The text, and the time and memory it took.

    Raises:
        OptionError: an option that transformers refuses, or a prompt that is empty or longer than the model.
        ConversionError: a model that generates no text.
    """
    from dbf_compile.integrations import pretrained

    trust, shown = bool(options.pop("trust_remote_code", False)), bool(options.pop("progress", True))
    settings = _settings(options, max_new_tokens)
    runnable, tokenizer = _opened(model, tokenizer, trust, shown)
    ids = prompt if isinstance(prompt, Tensor) else tokenizer(prompt, return_tensors="pt")["input_ids"]
    _check_prompt(runnable, ids, max_new_tokens)
    runnable, ids = runnable.to(chosen_device(device)).eval(), ids.to(chosen_device(device))
    settings |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_compilation(runnable, compiled)}
    streamer = pretrained.timed_streamer(tokenizer, stream)
    with _in_our_words(options):
        compile_seconds = _warmed_up(runnable, settings, shown) if compiled else 0.0
        began = time.perf_counter()
        with torch.no_grad():
            tokens = runnable.generate(**settings, streamer=streamer)
    ended = time.perf_counter()
    first = streamer.times[0] if streamer.times else ended
    return Generation(
        tokenizer.decode(tokens[0, streamer.prompt_tokens :], skip_special_tokens=True),
        ids.shape[1],
        tokens.shape[1] - streamer.prompt_tokens,
        first - began,
        ended - first,
        compile_seconds,
        weight_bytes(runnable),
    )


def _opened(model: nn.Module | str | Path, tokenizer: Any, trust: bool, shown: bool) -> tuple[Any, Any]:
    """Return a model and its tokenizer, opened where they are named."""
    if isinstance(model, nn.Module):
        return model, tokenizer
    say(f"opening {model}", shown)
    from dbf_compile.integrations import pretrained
    from dbf_compile.integrations.bars import bars_of_transformers

    with bars_of_transformers(shown):
        folder = pretrained.local_folder(model)
        tokenizer = pretrained.tokenizer_of(folder, trust) if tokenizer is None else tokenizer
        return pretrained.open_any(folder, trust), tokenizer


@contextmanager
def _in_our_words(options: dict[str, Any]) -> Iterator[None]:
    """Say of options of the caller's that transformers refuses them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not options:
            raise
        raise OptionError(
            f"options {options} of generate ({str(error).splitlines()[0]})",
            "arguments of generate of transformers that go with one sequence and one beam",
            "change or leave out what the message names",
        ) from error


def _settings(options: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Return arguments of ``generate``: greedy, but for what ``options`` say."""
    temperature, sample = options.get("temperature"), bool(options.get("do_sample"))
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens}", "1 or more", "leave it out for 64")
    if options.get("num_beams", 1) != 1:
        raise OptionError(
            f"num_beams={options['num_beams']}",
            "one beam: text is passed on token by token",
            "call generate of the model itself, which dbf_compile loads like any other",
        )
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **options}
    if temperature is None:
        return settings
    if not temperature >= 0 or (temperature > 0 and not sample):
        raise OptionError(
            f"temperature={temperature}" + ("" if sample else " without drawing"),
            "a number above 0 where tokens are drawn",
            "pass --sample (do_sample=True) with it, or leave it out for the likeliest token",
        )
    if temperature == 0:  # the limit of drawing: the likeliest token
        settings |= {"do_sample": False}
        del settings["temperature"]
    return settings


def _check_prompt(model: nn.Module, ids: Tensor, max_new_tokens: int) -> None:
    """Refuse a model that generates no text, and a prompt that it cannot go on from."""
    check_reads_tokens(model)
    if not predicts_tokens(model):
        raise ConversionError(
            f"{type(model).__name__}, which generates no text",
            "a model with can_generate(), such as one for causal language modeling",
            "call it directly, or open it as another class",
        )
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise OptionError(
            f"a prompt of token ids of shape {list(ids.shape)}",
            "one row of one token or more",
            "generate for one prompt at a time",
        )
    Limits.of(model).check({"input_ids": ids}, "the prompt")
    limit = positions_of(model)
    # The last token is not read again.
    length = (
        max(ids.shape[1], max_new_tokens) if is_encoder_decoder(model) else ids.shape[1] + max_new_tokens - 1
    )
    if limit is not None and length > limit:
        raise OptionError(
            f"a prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens}",
            f"the {limit} positions of {type(model).__name__}",
            "shorten the prompt, or ask for fewer new tokens",
        )


def _warmed_up(model: Any, settings: dict[str, Any], shown: bool) -> float:
    """Return the seconds that two tokens take. The cache gets the length of the real call: programs are compiled for its shape."""
    say("compiling", shown)
    began = time.perf_counter()
    with torch.no_grad():
        model.generate(**settings, stopping_criteria=[_AfterTwo()])
    return time.perf_counter() - began


def time_models(
    models: Sequence[str | Path],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    device: torch.device | str | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Time models in turns, and return the medians of :meth:`Generation.summary` by name.

    Args:
        models: folders or names on the Hub.
        prompt_tokens: length of a prompt of random tokens.
        new_tokens: tokens generated after it.
        rounds: repetitions; one round runs every model once, so that all meet the same state of the machine.
        device: where to compute; None for a GPU if there is one.
        progress: say on stderr what goes on.
        trust_remote_code: run code that comes with the models.
    """
    opened = {str(name): _opened(name, None, trust_remote_code, progress) for name in models}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
    for _ in over(range(rounds), "timing", "round", progress):
        for name, (model, tokenizer) in opened.items():
            generator = torch.Generator().manual_seed(0)
            vocabulary = min(len(tokenizer), vocabulary_of(model) or len(tokenizer))
            prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator)
            options: dict[str, Any] = {"device": device, "eos_token_id": -1, "progress": False}
            generation = generate(model, prompt, tokenizer=tokenizer, max_new_tokens=new_tokens, **options)
            figures[name].append(generation.summary())
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in figures.items()
    }


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; tensors that layers share count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _compilation(model: nn.Module, compiled: bool) -> dict[str, Any]:
    if not compiled:
        return {"disable_compile": True}
    from dbf_compile.integrations import pretrained

    factored = any(isinstance(layer, DoubleBinaryLinear) for layer in model.modules())
    return pretrained.compile_options("dbf" if factored else "inductor", next(model.parameters()).device)


class _AfterTwo:
    """Stops after two new tokens: by then prefill and one step of decoding are compiled."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._calls += 1
        return torch.full((ids.shape[0],), self._calls >= 2, device=ids.device)
