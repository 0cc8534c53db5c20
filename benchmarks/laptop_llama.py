"""llama.cpp, as llama-cpp-python carries it: files of other types, and a model that reads and writes tokens."""

from __future__ import annotations

import ctypes
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

TYPES = ("Q4_0", "Q4_K_M", "Q2_K", "TQ2_0", "Q2_0", "Q1_0")


def installed() -> bool:
    return find_spec("llama_cpp") is not None


def library() -> Any:
    """Return the library, which says nothing while it loads."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    pass


def quantize(source: Path, kind: str, path: Path) -> None:
    """Write a file of another type."""
    library_ = library()
    parameters = library_.llama_model_quantize_default_params()
    parameters.ftype = getattr(library_, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = library_.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters))
    if status:
        raise SystemExit(f"llama.cpp does not quantize {source} to {kind}: status {status}")


class Llama:
    """A model with a cache for ``batch`` sequences of ``positions`` tokens.

    Args:
        path: a GGUF file.
        threads: of prefill and decoding.
        positions: of one sequence.
        batch: sequences.
    """

    def __init__(self, path: Path, threads: int, positions: int, batch: int) -> None:
        self._library = library()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        settings = self._library.llama_context_default_params()
        settings.n_ctx = positions * batch
        settings.n_batch = (
            settings.n_ctx
        )  # of one call; computed in pieces of n_ubatch, the library's default
        settings.n_seq_max = batch
        settings.n_threads = settings.n_threads_batch = threads
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context for {path}")
        vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(vocabulary))
        self._batch = self._library.llama_batch_init(settings.n_batch, 0, batch)

    def generate(self, prompt: np.ndarray, new: int) -> tuple[float, float]:
        """Read a prompt [batch, T] and write the likeliest tokens; return the seconds to the first token, and of the others."""
        length = prompt.shape[1]
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        began = time.perf_counter()
        tokens = self._step(prompt, 0)
        first = time.perf_counter()
        for index in range(new - 1):
            tokens = self._step(tokens[:, None], length + index)
        return first - began, time.perf_counter() - first

    def _step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Return the likeliest next token of every sequence."""
        count, length = tokens.shape
        batch, place, ends = self._batch, 0, []
        for row in range(count):
            for column in range(length):
                batch.token[place] = int(tokens[row, column])
                batch.pos[place] = position + column
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = row
                batch.logits[place] = column == length - 1
                place += 1
            ends.append(place - 1)
        batch.n_tokens = place
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama.cpp does not decode: status {status}")
        logits = (self._library.llama_get_logits_ith(self._context, end) for end in ends)
        rows = [np.ctypeslib.as_array(row, (self.vocabulary,)) for row in logits]
        return np.array([int(row.argmax()) for row in rows])
