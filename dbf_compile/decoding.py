"""The loop of decoding: prompts are read into a cache that stays between calls, then tokens follow one after the other.

A step is one compiled program, called without guards: see :mod:`dbf_compile.compiler.programs`. There are three, each made when
it is first needed: for a part of a prompt of any length, for one token, and for one token each of several rows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbf_compile.attention_ops import empty_cache
from dbf_compile.compiler import programs
from dbf_compile.errors import first_line
from dbf_compile.files import cache_folder, one_at_a_time
from dbf_compile.hashes import source_hash
from dbf_compile.integrations.generation_settings import UnsuitedError
from dbf_compile.integrations.starts import StoredModel
from dbf_compile.machine import instructions
from dbf_compile.progress import say

_PART = 512  # tokens of a prompt at a time; more do not make it faster, and take memory
_MULTIPLE = 256  # positions by which the cache grows
_LONGEST_COMPILATION = 900  # seconds that a process waits for another one's
# Dimensions that differ from call to call, by argument.
_LENGTHS = {"keys": [3], "values": [2]}
_DYNAMIC = {
    "part": {**_LENGTHS, "tokens": [1], "positions": [1]},
    "token": _LENGTHS,
    "rows": {"keys": [0, 3], "values": [0, 2], "tokens": [0], "positions": [0]},
}
# Rows and tokens of examples: a size of one would be taken to stay one.
_EXAMPLES = {"part": (1, 24), "token": (1, 1), "rows": (3, 1)}


class NotStoredError(Exception):
    """A program has to be compiled, for which the model has to be opened."""


class Decoder:
    """Runs a model over a cache of its own.

    Args:
        model: of transformers, on a CPU; or what stands for one whose programs are compiled.
        compiled: False to run eagerly.
        progress: say on stderr what goes on.

    Raises:
        UnsuitedError: the model does not fit; its own ``generate`` does.
        NotStoredError: what stands for the model does no longer.

    Attributes:
        sizes: of the cache, by layer.
    """

    def __init__(self, model: Any, compiled: bool, progress: bool) -> None:
        self._model, self._compiled, self._progress = model, compiled, progress
        if isinstance(model, StoredModel):
            self.sizes = model.sizes
        else:
            self.sizes = _steps().probe(model)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._held: list[list[int]] = []  # the tokens whose keys and values a row has
        self._programs: dict[str, programs.Program] = {}
        self._calls: dict[str, _Call] = {}
        self._weights: list[tuple[int, int]] = []
        self._forms = _forms_of(model)
        self._compile_seconds = 0.0
        # Results of layers are rounded to 16 bits then: by forty times the error of fast sums.
        self._is_rounded = model.dtype in (torch.bfloat16, torch.float16)
        self._prepare("token")

    def is_of(self, model: Any) -> bool:
        """Return whether it runs this model, whose tensors are of the sizes, dtypes and devices that the programs are for."""
        return model is self._model and self._forms == _forms_of(model)

    def prepare(self, rows: int) -> None:
        """Make the programs for so many rows.

        Raises:
            UnsuitedError: the model's step is not compiled as one.
            NotStoredError: as for the class.
        """
        for kind in ("token", "part", *(["rows"] if rows > 1 else [])):
            self._prepare(kind)

    def fingerprint(self) -> str:
        """Return a hash of all that programs depend on."""
        return self._model.fingerprint if isinstance(self._model, StoredModel) else _fingerprint(self._model)

    def kinds(self) -> set[str]:
        """Return which programs there are."""
        return set(self._programs)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the model that programs read, by their paths."""
        arguments = {"model": self._model}
        return {
            path: tensor
            for program in self._programs.values()
            for path, tensor in program.tensors(arguments).items()
        }

    def compile_seconds(self) -> float:
        """Return the seconds that programs took since the last call."""
        seconds, self._compile_seconds = self._compile_seconds, 0.0
        return seconds

    def read(self, prompts: Sequence[list[int]], room: int) -> tuple[Tensor, list[int]]:
        """Read prompts, and return the logits of what follows, float32 [B, vocabulary], and how many tokens were known.

        Args:
            prompts: of one token or more; what a row has read before is not read again.
            room: tokens that will follow at most.
        """
        weights = _weights_of(self._model)
        if weights != self._weights:  # what was read, and inputs that were gathered, are of others
            self._weights, self._calls, self._held = weights, {}, [[] for _ in self._held]
        self._reserve(len(prompts), max(map(len, prompts)) + room)
        logits, known = [], []
        for row, tokens in enumerate(prompts):
            held = self._held[row]
            same = next(
                (index for index, pair in enumerate(zip(held, tokens, strict=False)) if pair[0] != pair[1]),
                min(len(held), len(tokens)),
            )
            start = min(same, len(tokens) - 1)  # the last one is read in any case, for its logits
            del held[start:]
            known.append(start)
            for first in range(start, len(tokens), _PART):
                part = tokens[first : first + _PART]
                positions = torch.arange(first, first + len(part))[None]
                last = self._step("token" if len(part) == 1 else "part", torch.tensor([part]), positions, row)
                held += part
            logits.append(last)
        return torch.cat(logits), known

    def follow(self, tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        """Add a token to every row that is active, and return the logits of what follows, float32 [B, vocabulary]."""
        positions = torch.tensor([[len(held)] for held in self._held])
        kind = "token" if len(tokens) == 1 else "rows"
        logits = self._step(kind, torch.tensor([[token] for token in tokens]), positions)
        for held, token, goes_on in zip(self._held, tokens, active, strict=True):
            if goes_on:
                held.append(token)
        return logits

    def _step(self, kind: str, tokens: Tensor, positions: Tensor, row: int | None = None) -> Tensor:
        last = torch.tensor([tokens.shape[1] - 1])
        if not self._compiled:
            rows = slice(None) if row is None else slice(row, row + 1)
            keys, values = ([tensor[rows] for tensor in cache] for cache in (self._keys, self._values))
            steps = _steps()
            with torch.no_grad(), steps.our_attention(self._model):
                logits: Tensor = steps.step(self._model, tokens, positions, last, keys, values)
                return logits
        self._prepare(kind)
        name = f"{kind} {row or 0}"
        if name not in self._calls:
            rows = slice(None) if kind == "rows" else slice(row or 0, (row or 0) + 1)
            keys, values = ([tensor[rows] for tensor in cache] for cache in (self._keys, self._values))
            stored = self._model.tensors if isinstance(self._model, StoredModel) else {}
            arguments = {"model": self._model, "keys": keys, "values": values, **stored}
            self._calls[name] = _Call(self._programs[kind], arguments, tokens, positions, last)
        with torch.no_grad():
            return self._calls[name](tokens, positions, last)

    def _reserve(self, rows: int, length: int) -> None:
        """Make room for rows and positions; what is held stays."""
        old_rows, old_length = (self._keys[0].shape[0], self._keys[0].shape[3]) if self._keys else (0, 0)
        if rows != old_rows or length > old_length:
            length = max(old_length, -(-length // _MULTIPLE) * _MULTIPLE)
            keys, values = empty_cache(self.sizes, rows, length, self._model.device)
            kept = min(rows, old_rows)
            for new, old in zip(keys, self._keys, strict=False):
                new[:kept, :, :, :old_length] = old[:kept]
            for new, old in zip(values, self._values, strict=False):
                new[:kept, :, :old_length] = old[:kept]
            self._keys, self._values = keys, values
            self._held = [*self._held[:kept], *([] for _ in range(rows - kept))]
            self._calls = {}

    def _prepare(self, kind: str) -> None:
        if self._compiled and kind not in self._programs:
            self._program(kind)

    def _program(self, kind: str) -> None:
        """Load a program, or compile it."""
        began = time.perf_counter()
        folder = cache_folder() / "programs" / f"{kind}-{self.fingerprint()}"
        program = programs.load_program(folder)
        if program is None:
            with suppress(OSError):
                folder.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(folder.with_suffix(".lock"), _LONGEST_COMPILATION):
                program = programs.load_program(folder) or self._compile(kind, folder)
        self._programs[kind] = program
        self._compile_seconds += time.perf_counter() - began

    def _compile(self, kind: str, folder: Path) -> programs.Program:
        if isinstance(self._model, StoredModel):
            raise NotStoredError(kind)
        steps = _steps()
        # Imports Dynamo and Inductor, which takes seconds: only if there is something to compile.
        from dbf_compile.compiler.ahead_of_time import compile_program

        say("compiling; kept for the next start where the cache can be written", self._progress)
        rows, count = _EXAMPLES[kind]
        keys, values = empty_cache(self.sizes, rows, 2 * _MULTIPLE + 40, self._model.device)
        arguments = {
            "model": self._model,
            "tokens": torch.zeros(rows, count, dtype=torch.int64),
            "positions": torch.arange(count).expand(rows, count).contiguous(),
            "last": torch.tensor([count - 1]),
            "keys": keys,
            "values": values,
        }
        try:
            with steps.our_attention(self._model):
                return compile_program(steps.step, arguments, _DYNAMIC[kind], folder, fast=self._is_rounded)
        except Exception as error:  # whatever the code of a model has that cannot be traced whole
            raise UnsuitedError(f"it is not compiled as one ({first_line(error)})") from error


def _steps() -> Any:
    # Imports the code of models, which takes seconds: only if there is one.
    from dbf_compile.integrations import steps

    return steps


def _fingerprint(model: Any) -> str:
    parts = (
        _steps().fingerprint(model),
        source_hash("dbf_compile"),
        torch.__version__,
        torch.version.git_version,
        instructions(),
        torch.get_num_threads(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _weights_of(model: Any) -> list[tuple[int, int]]:
    """Return what changes when weights do: where they lie, and how often they were written to."""
    return [
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for _, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


def _forms_of(model: Any) -> list[tuple[Any, ...]]:
    """Return what programs take for granted of a model's tensors."""
    return [
        (name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


class _Call:
    """A program with all of its inputs but those of one step."""

    def __init__(
        self,
        program: programs.Program,
        arguments: dict[str, Any],
        tokens: Tensor,
        positions: Tensor,
        last: Tensor,
    ) -> None:
        self._function = program.function
        step = {"tokens": tokens, "positions": positions, "last": last}
        self._inputs = program.inputs(arguments | step)
        self._places = {name: program.places(name) for name in step}

    def __call__(self, tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Run a step."""
        inputs = self._inputs
        step = {"tokens": tokens, "positions": positions, "last": last}
        for name, places in self._places.items():
            for place in places:
                inputs[place] = step[name]
        return self._function(inputs)[0]
