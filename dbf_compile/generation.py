"""Generation of text with compiled decoding, and its speed and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from dbf_compile.errors import OptionError
from dbf_compile.machine import chosen_device
from dbf_compile.options import Sampling
from dbf_compile.progress import over, say
from dbf_compile.records import parse
from dbf_compile.sampling import Sampler, checked
from dbf_compile.text_model import TextModel, opened, tokenizer_of
from dbf_compile.text_stream import TextStream


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
        known_tokens: tokens at the start of the prompt that the call before had read already.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    weight_bytes: int
    known_tokens: int = 0

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second, of those that had to be read."""
        return (self.prompt_tokens - self.known_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens a second."""
        return (self.new_tokens - 1) / max(self.decode_seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        """Return the figures, without the text."""
        figures = {key: value for key, value in asdict(self).items() if key != "text"}
        return {**figures, "prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


class TextGenerator:
    """Generates text with one model, call after call, with compiled prefill and decoding.

    An encoder-decoder reads the prompt and writes an answer; decoder-only models continue it. There is one beam, whatever
    the generation settings of the model say.

    Decoder-only models on a CPU run in a loop of our own (:mod:`dbf_compile.decoding`): several prompts decode together, and
    what the call before has read is not read again. Other models, and options that the loop does not have, go to ``generate``
    of transformers, one prompt after the other.

    Args:
        model: a model of transformers, its folder, a GGUF file, or its name on the Hub.
        tokenizer: of the model; None for that of its folder.
        compiled: False to run eagerly.
        device: where to compute; None for a GPU if there is one.
        trust_remote_code: run code that comes with the model.
        progress: say on stderr what goes on.

    Raises:
        ConversionError: a model that generates no text.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        tokenizer: Any = None,
        compiled: bool = True,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
    ) -> None:
        place = chosen_device(device)
        if isinstance(model, nn.Module):
            self.about = TextModel(model, None, place)
            self.tokenizer = tokenizer
        else:
            say(f"opening {model}", progress)
            self.about, self.tokenizer = opened(
                model, tokenizer, place, compiled, trust_remote_code, progress
            )
        self._compiled, self._progress = compiled, progress
        self._decoder: Any = None
        self._kept: set[str] = set()
        self._fits = True  # our own loop, as far as is known
        self._said: set[str] = set()

    @property
    def model(self) -> Any:
        """The model; one that was not needed so far is opened."""
        return self.about.model

    @overload
    def generate(self, prompts: str | Tensor, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompts: Sequence[str | Tensor], **options: Any) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Tensor | Sequence[str | Tensor],
        *,
        max_new_tokens: int = 64,
        stream: Callable[[str], object] | None = None,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several.

        An interruption, such as KeyboardInterrupt, leaves the generator usable; ``stream`` has the text so far.

        Args:
            prompts: the text to continue, or its token ids, int64 [1, T], or a sequence of such.
            max_new_tokens: 1 or more.
            stream: called with every piece of text as it is generated; for one prompt.
            stop: strings that end the text; it does not have them.
            **options: fields of :class:`~dbf_compile.options.Sampling`, and further arguments of ``model.generate``.

        Returns:
            For every prompt the text, and the time and memory it took; for a sequence of prompts, a list.

        Raises:
            OptionError: an option that transformers refuses, or a prompt that is empty or longer than the model.
        """
        several = not isinstance(prompts, (str, Tensor))
        texts: list[Any] = list(prompts) if several else [prompts]
        if stream is not None and len(texts) > 1:
            raise OptionError(
                f"stream for {len(texts)} prompts",
                "one prompt: pieces of several texts would mix",
                "generate for one after the other, or leave out stream",
            )
        _check_options(max_new_tokens, stop, options)
        names = {item.name for item in fields(Sampling)}
        sampling = checked(parse(Sampling, {key: value for key, value in options.items() if key in names}))
        others = {key: value for key, value in options.items() if key not in names}
        ids = [self._ids(text) for text in texts]
        for row in ids:
            self._check(row, max_new_tokens)
        streams = [TextStream(self.tokenizer, stop, stream) for _ in ids]
        way = self._steps(len(ids), sampling, others)
        if way is None:
            options = {key: value for key, value in asdict(sampling).items() if value is not None} | others
            options["max_new_tokens"] = max_new_tokens
            results = [
                self._by_transformers(row, text, options) for row, text in zip(ids, streams, strict=True)
            ]
        else:
            results = self._by_steps([row[0].tolist() for row in ids], streams, max_new_tokens, *way)
        return results if several else results[0]

    def _steps(
        self, rows: int, sampling: Sampling, others: dict[str, Any]
    ) -> tuple[Sampling, set[int]] | None:
        """Return how to choose tokens with our own loop, and which end a text; None where a model or an option does not fit it."""
        from dbf_compile.decoding import NotStoredError
        from dbf_compile.integrations.generation_settings import UnsuitedError, sampling_of

        try:
            way = sampling_of(self.about.generation_config, sampling, others)
            self._forget_other_model()
            if self._fits:
                try:
                    stored = True
                    try:
                        self._prepare(rows)
                    except NotStoredError:
                        stored = False
                    if not stored:
                        # Not where the exception is handled: it holds tensors, which would be in memory twice.
                        self._decoder = None
                        self.about.open()
                        self._prepare(rows)
                except UnsuitedError:  # an interruption says nothing of the model
                    self._decoder, self._fits = None, False
                    raise
        except UnsuitedError as reason:
            message = f"decoding as transformers does, which is slower: {reason}"
            say(message, self._progress and message not in self._said)
            self._said.add(message)
            return None
        return None if self._decoder is None else way

    def _forget_other_model(self) -> None:
        """Drop the decoder where its model is not the one that is there now."""
        if self._decoder is not None and not self._decoder.is_of(self.about.source):
            self._decoder, self._fits = None, True

    def _prepare(self, rows: int) -> None:
        """Make the decoder ready for so many rows, and keep what the next start takes."""
        from dbf_compile.decoding import Decoder

        if self._decoder is None:
            self._decoder, self._kept = Decoder(self.about.source, self._compiled, self._progress), set()
        self._decoder.prepare(rows)
        if self._decoder.kinds() != self._kept:
            self._kept = self._decoder.kinds()
            self.about.keep(self._decoder, self.tokenizer)

    def _by_steps(
        self,
        prompts: list[list[int]],
        streams: list[TextStream],
        max_new_tokens: int,
        sampling: Sampling,
        ends: set[int],
    ) -> list[Generation]:
        """Generate all texts together with our own loop."""
        decoder = self._decoder
        assert decoder is not None
        compiling = decoder.compile_seconds()
        sampler = Sampler(sampling, len(prompts), self.about.device)
        history, active = [list(tokens) for tokens in prompts], [True] * len(prompts)
        began = time.perf_counter()
        logits, known = decoder.read(prompts, max_new_tokens)
        first = 0.0
        for index in range(max_new_tokens):
            if index > 0:
                logits = decoder.follow([tokens[-1] for tokens in history], active)
            tokens = sampler.choose(logits, history).tolist()
            first = first or time.perf_counter()
            for row, token in enumerate(tokens):
                if active[row]:
                    history[row].append(token)
                    active[row] = not streams[row].put(token) and token not in ends
            if not any(active):
                break
        times = (first - began, time.perf_counter() - first, compiling)
        return [
            Generation(text.end(), len(prompt), len(text.tokens), *times, self.about.weight_bytes, reused)
            for text, prompt, reused in zip(streams, prompts, known, strict=True)
        ]

    def _by_transformers(self, ids: Tensor, text: TextStream, options: dict[str, Any]) -> Generation:
        """Generate one text with ``model.generate``."""
        from dbf_compile.integrations.generate import generate as run

        model = self.model
        self._forget_other_model()  # else what stood for it would be in memory beside it
        times = run(model, ids, text, options, self._compiled, self._progress)
        return Generation(text.end(), ids.shape[1], len(text.tokens), *times, self.about.weight_bytes)

    def _check(self, ids: Tensor, max_new_tokens: int) -> None:
        """Refuse a prompt that the model cannot go on from."""
        if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise OptionError(
                f"a prompt of token ids of shape {list(ids.shape)}",
                "one row of one token or more",
                "pass several prompts as a list",
            )
        limits = self.about.limits
        limits.check({"input_ids": ids}, "the prompt")
        # The last token is not read again.
        length = (
            max(ids.shape[1], max_new_tokens) if self.about.answers else ids.shape[1] + max_new_tokens - 1
        )
        if limits.positions is not None and length > limits.positions:
            raise OptionError(
                f"a prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens}",
                f"the {limits.positions} positions of {self.about.name}",
                "shorten the prompt, or ask for fewer new tokens",
            )

    def _ids(self, prompt: str | Tensor) -> Tensor:
        ids: Tensor = prompt if isinstance(prompt, Tensor) else self._tokenized(prompt)
        return ids.to(self.about.device)

    def _tokenized(self, prompt: str) -> Any:
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(None)
        return self.tokenizer(prompt, return_tensors="pt")["input_ids"]


def generate(
    model: nn.Module | str | Path,
    prompt: str | Tensor | Sequence[str | Tensor],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    stream: Callable[[str], object] | None = None,
    compiled: bool = True,
    device: torch.device | str | None = None,
    **options: Any,
) -> Any:
    """Generate text once; see :class:`TextGenerator` for more than one call.

    Args:
        model: a model of transformers, its folder, a GGUF file, or its name on the Hub.
        prompt: the text to continue, or its token ids, int64 [1, T], or a sequence of such.
        tokenizer: of the model; None for that of its folder.
        max_new_tokens: 1 or more.
        stream: called with every piece of text as it is generated.
        compiled: False to run eagerly.
        device: where to compute; None for a GPU if there is one.
        **options: ``stop``, strings that end the text; fields of :class:`~dbf_compile.options.Sampling`; further arguments
            of ``model.generate``; with ``trust_remote_code=True`` code that comes with the model is run; with
            ``progress=False`` nothing is said on stderr.

    Returns:
        The text, and the time and memory it took; for a sequence of prompts, a list.

    Raises:
        OptionError: an option that transformers refuses, or a prompt that is empty or longer than the model.
        ConversionError: a model that generates no text.
    """
    generator = TextGenerator(
        model,
        tokenizer=tokenizer,
        compiled=compiled,
        device=device,
        trust_remote_code=bool(options.pop("trust_remote_code", False)),
        progress=bool(options.pop("progress", True)),
    )
    return generator.generate(prompt, max_new_tokens=max_new_tokens, stream=stream, **options)


def _check_options(max_new_tokens: int, stop: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse what no way of generating does."""
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens}", "1 or more", "leave it out for 64")
    if isinstance(stop, str) or not all(isinstance(item, str) and item for item in stop):
        raise OptionError(f"stop={stop!r}", "a list of strings that are not empty", "leave it out for none")
    if options.get("num_beams", 1) != 1:
        raise OptionError(
            f"num_beams={options['num_beams']}",
            "one beam: text is passed on token by token",
            "call generate of the model itself, which dbf_compile loads like any other",
        )


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
    opened = {
        str(name): TextGenerator(name, device=device, trust_remote_code=trust_remote_code, progress=progress)
        for name in models
    }
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
    for _ in over(range(rounds), "timing", "round", progress):
        for name, generator in opened.items():
            words = len(generator.tokenizer)
            vocabulary = min(words, generator.about.limits.vocabulary or words)
            prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
            generation = generator.generate(prompt, max_new_tokens=new_tokens, eos_token_id=-1)
            figures[name].append(generation.summary())
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in figures.items()
    }
