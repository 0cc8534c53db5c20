"""Generation of text with compiled decoding, and its speed and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.machine import chosen_device


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

    Args:
        model: a model of transformers, its folder, or its name on the Hub.
        prompt: the text to continue, or its token ids, int64 [1, T].
        tokenizer: of the model; None for that of its folder.
        max_new_tokens: 1 or more.
        stream: called with every piece of text as it is generated.
        compiled: False to run eagerly.
        device: where to compute; None for a GPU if there is one.
        **options: further arguments of ``model.generate``, such as ``do_sample`` and ``temperature``.

    Returns:
        The text, and the time and memory it took.
    """
    from dbf_compile.integrations import pretrained

    if not isinstance(model, nn.Module):
        folder = pretrained.local_folder(model)
        tokenizer = pretrained.tokenizer_of(folder) if tokenizer is None else tokenizer
        model = pretrained.open_any(folder)
    runnable: Any = model
    runnable = runnable.to(chosen_device(device)).eval()
    ids = prompt if isinstance(prompt, Tensor) else tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids.to(chosen_device(device))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"do_sample": False, **options, **_compilation(runnable, compiled)}
    length = {"max_new_tokens": max_new_tokens, "min_new_tokens": min(2, max_new_tokens)}
    prompt_tokens = ids.shape[1]
    # The cache gets the length of the real call: programs are compiled for its shape.
    warmup = {"max_new_tokens": max_new_tokens, "stopping_criteria": [_AfterTwo(prompt_tokens)]}
    compile_seconds = _timed(runnable, **inputs, **settings, **warmup) if compiled else 0.0
    streamer = pretrained.timed_streamer(tokenizer, stream)
    began = time.perf_counter()
    with torch.no_grad():
        tokens = runnable.generate(**inputs, **settings, **length, streamer=streamer)
    ended = time.perf_counter()
    first = streamer.times[0] if streamer.times else ended
    return Generation(
        tokenizer.decode(tokens[0, prompt_tokens:], skip_special_tokens=True),
        prompt_tokens,
        tokens.shape[1] - prompt_tokens,
        first - began,
        ended - first,
        compile_seconds,
        weight_bytes(runnable),
    )


def _timed(model: Any, **arguments: Any) -> float:
    """Return the seconds that ``model.generate`` takes."""
    began = time.perf_counter()
    with torch.no_grad():
        model.generate(**arguments)
    return time.perf_counter() - began


def time_models(
    models: Sequence[str | Path],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """Time models in turns, and return the medians of :meth:`Generation.summary` by name.

    Args:
        models: folders or names on the Hub.
        prompt_tokens: length of a prompt of random tokens.
        new_tokens: tokens generated after it.
        rounds: repetitions; one round runs every model once, so that all meet the same state of the machine.
        device: where to compute; None for a GPU if there is one.
    """
    from dbf_compile.integrations import pretrained

    opened = {}
    for name in models:
        folder = pretrained.local_folder(name)
        opened[str(name)] = (pretrained.open_any(folder), pretrained.tokenizer_of(folder))
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
    for _ in range(rounds):
        for name, (model, tokenizer) in opened.items():
            generator = torch.Generator().manual_seed(0)
            prompt = torch.randint(len(tokenizer), (1, prompt_tokens), generator=generator)
            generation = generate(
                model, prompt, tokenizer=tokenizer, max_new_tokens=new_tokens, device=device, eos_token_id=-1
            )
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

    def __init__(self, prompt_tokens: int) -> None:
        self._enough = prompt_tokens + 2

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= self._enough, device=ids.device)
