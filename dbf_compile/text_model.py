"""The model that text is generated with: in memory, or what was kept of one that is not opened until somebody needs it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbf_compile.calibration.limits import Limits
from dbf_compile.calibration.model_io import check_reads_tokens, is_encoder_decoder, predicts_tokens
from dbf_compile.errors import ConversionError
from dbf_compile.huge_pages import move_to_huge_pages


class TextModel:
    """A model that generates text.

    Args:
        source: the model, or a :class:`~dbf_compile.integrations.starts.StoredModel`.
        folder: that it was opened from, and is opened from where a stored one does not do; None for a model in memory.
        place: where to compute.
        trust_remote_code: run code that comes with the model.
        progress: show it.
        keeps: whether to keep what the next start of a folder takes.

    Raises:
        ConversionError: the model generates no text.
    """

    def __init__(
        self,
        source: Any,
        folder: Path | None,
        place: torch.device,
        trust_remote_code: bool = False,
        progress: bool = True,
        keeps: bool = False,
    ) -> None:
        self._folder, self._place = folder, place
        self._trust, self._progress, self._keeps = trust_remote_code, progress, keeps
        self._opened: Any = None
        self.source: Any = source
        if source is None:
            self.open()
        elif isinstance(source, nn.Module):
            self._take(source)

    @property
    def is_open(self) -> bool:
        """Whether the model is in memory."""
        return isinstance(self.source, nn.Module)

    @property
    def model(self) -> Any:
        """The model; it is opened if it is not."""
        if not self.is_open:
            self.open()
        return self.source

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        place: torch.device = self.source.device
        return place

    @property
    def generation_config(self) -> Any:
        """Its settings of generation."""
        return self.source.generation_config

    @property
    def limits(self) -> Limits:
        """How many tokens it reads, and which."""
        if self.is_open:
            return Limits.of(self.source)
        stored = self.source.limits
        return Limits(**{**stored, "placeholders": frozenset(stored["placeholders"])})

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self.source).__name__ if self.is_open else str(self.source.name)

    @property
    def answers(self) -> bool:
        """Whether its text is no continuation of the prompt: that of an encoder-decoder."""
        return self.is_open and is_encoder_decoder(self.source)

    @property
    def weight_bytes(self) -> int:
        """The bytes of its parameters and buffers."""
        return self._weight_bytes if self.is_open else int(self.source.weight_bytes)

    def open(self) -> None:
        """Open the model of the folder in place of what stands for it."""
        assert self._folder is not None
        from dbf_compile.integrations import pretrained, starts
        from dbf_compile.integrations.bars import bars_of_transformers

        file = starts.file_of(self._folder) if self._keeps else None
        with bars_of_transformers(self._progress):
            self._take(pretrained.open_any(self._folder, self._trust))
        move_to_huge_pages(self.source)
        if file is not None:
            limits = self.limits
            as_json = {**asdict(limits), "placeholders": sorted(limits.placeholders)}
            self._opened = starts.OpenedModel(self._folder, file, self.source, as_json)

    def keep(self, decoder: Any, tokenizer: Any) -> None:
        """Keep what the next start takes, if the model is of a folder and as it was opened.

        Args:
            decoder: with the programs that are made.
            tokenizer: that was opened beside the model.
        """
        if self._opened is not None:
            parts = (decoder.tensors(), decoder.sizes, decoder.fingerprint())
            self._opened.keep(*parts, self.weight_bytes, tokenizer)

    def _take(self, model: Any) -> None:
        check_reads_tokens(model)  # a model of pictures has no tokenizer either
        if not predicts_tokens(model):
            raise ConversionError(
                f"{type(model).__name__}, which generates no text",
                "a model with can_generate(), such as one for causal language modeling",
                "call it directly, or open it as another class",
            )
        self.source = model.to(self._place).eval()
        self._weight_bytes = weight_bytes(self.source)


def opened(
    name: str | Path, tokenizer: Any, place: torch.device, compiled: bool, trust: bool, progress: bool
) -> tuple[TextModel, Any]:
    """Return a model by its name, and its tokenizer.

    Args:
        name: of a folder, a GGUF file, or a name on the Hub.
        tokenizer: that is returned; None for the model's own.
        place: where to compute.
        compiled: whether programs are used; only then a start can be kept, or found.
        trust: run code that comes with the model.
        progress: show it.
    """
    from dbf_compile.integrations import origins, starts
    from dbf_compile.integrations.bars import bars_of_transformers

    keeps = compiled and not trust and place.type == "cpu"
    with bars_of_transformers(progress):
        folder = origins.local_folder(name)
        source = starts.load(folder) if keeps else None
        model = TextModel(source, folder, place, trust, progress, keeps)
        return model, tokenizer_of(folder, trust) if tokenizer is None else tokenizer


def tokenizer_of(folder: Path | None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in the folder of a model.

    Raises:
        ConversionError: there is none.
    """
    from dbf_compile.integrations import starts

    kept = None if folder is None or trust_remote_code else starts.tokenizer_of(folder)
    if kept is not None:
        return kept
    from dbf_compile.integrations import pretrained

    return pretrained.tokenizer_of(folder, trust_remote_code)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; tensors that layers share count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
