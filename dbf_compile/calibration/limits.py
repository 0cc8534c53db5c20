"""Limits of a model of transformers: how many positions it has, and which ids. They are looked at before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbf_compile.calibration.model_io import is_causal, vocabulary_of
from dbf_compile.errors import ConversionError, OptionError

_log = logging.getLogger(__name__)

# What configurations call the number of positions.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
)
# What models call a table of positions beside their embedding of tokens.
_TABLES = (
    "position_embeddings",
    "position_embedding",
    "embed_positions",
    "positions_embed",
    "pos_embed",
    "wpe",
)
_IGNORED = -100  # label of a position that has none
_NO_TEXT = ("image", "video", "audio", "speech")


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a model reads at once, or None where that has no limit: relative positions, recurrence.

    That is the least of what its configuration says, times the factor of scaled rotary embeddings, and of the rows of its
    table of positions that are not set apart for padding.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    limits = [_configured(config), *_tables(model)]
    return min((limit for limit in limits if limit is not None), default=None)


def embedded_ids(model: nn.Module) -> int | None:
    """Return the number of ids that a model has an embedding of, or None where it reads no ids."""
    rows = getattr(_token_embedding(model), "num_embeddings", None)
    return rows if isinstance(rows, int) else vocabulary_of(model)


def window_length(model: nn.Module, length: int | None, usual: int) -> int:
    """Return the tokens of a window: ``length``, or else ``usual``, but no more than the model has positions.

    Raises:
        OptionError: ``length`` exceeds the positions.
    """
    positions = positions_of(model)
    if positions is None or (length or usual) <= positions:
        return length or usual
    if length is not None:
        raise OptionError(
            f"length={length} for a model of {positions} positions",
            f"2 to {positions}",
            "leave length out for as many as the model has",
        )
    _log.warning("windows have %d tokens instead of %d: the model has no more positions", positions, usual)
    return positions


def checked(model: nn.Module, batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches after looking at them: at all of a list at once, at those of an iterator one by one as they come.

    Raises:
        ConversionError: the model cannot read one of them.
    """
    if isinstance(batches, (Mapping, str)):
        raise ConversionError(
            f"batches of type {type(batches).__name__}", "a list of batches", "pass a single one as [batch]"
        )
    limits = Limits.of(model)
    looked_at = limits.each(batches)
    return list(looked_at) if isinstance(batches, Sequence) else looked_at


@dataclass(frozen=True)
class Limits:
    """What batches of token ids are checked for.

    Args:
        positions: how many tokens the model reads at once, or None.
        vocabulary: how many ids it has, or None.
        causal: whether labels are the ids of a text.
        placeholders: ids outside of the vocabulary that stand for a picture or a sound.
        known: False for a model without a configuration, whose batches may be anything.
    """

    positions: int | None
    vocabulary: int | None
    causal: bool
    placeholders: frozenset[int] = frozenset()
    known: bool = True

    @staticmethod
    def of(model: nn.Module) -> Limits:
        """Return the limits of a model."""
        config: Any = getattr(model, "config", None)
        if config is None:
            return Limits(None, None, False, known=False)
        placeholders = {
            value
            for name, value in vars(config).items()
            if name.startswith(_NO_TEXT)
            and name.endswith(("_token_id", "_token_index"))
            and isinstance(value, int)
        }
        return Limits(positions_of(model), embedded_ids(model), is_causal(model), frozenset(placeholders))

    def each(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield batches after checking each."""
        for number, batch in enumerate(batches):
            self.check(batch, f"batch {number}")
            yield batch

    def check(self, batch: Any, place: str) -> None:
        """Check the token ids of a batch, its mask and its labels; ``place`` names it in errors.

        Raises:
            ConversionError: the model cannot read it.
        """
        if not self.known or self.vocabulary is None:
            return
        named = batch if isinstance(batch, Mapping) else {}
        ids = named.get("input_ids")
        if isinstance(batch, Tensor) or (isinstance(batch, (tuple, list)) and batch):
            ids = batch if isinstance(batch, Tensor) else batch[0]
            if isinstance(ids, Tensor) and ids.is_floating_point():
                return  # embeddings, or the input of a model of another kind
        if ids is None:
            return
        self._check_ids(ids, place)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != ids.shape:
            raise ConversionError(
                f"{place}: attention_mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}",
                "equal shapes",
                "pass the mask that the tokenizer returns",
            )
        if self.causal and isinstance(named.get("labels"), Tensor):
            self._check_labels(named["labels"], ids, place)

    def _check_ids(self, ids: Any, place: str) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = f"dtype {ids.dtype}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
            raise ConversionError(
                f"{place}: token ids of {kind}", "a tensor of int64", "pass torch.tensor(ids)"
            )
        if ids.dim() < 2 or not ids.numel():
            raise ConversionError(
                f"{place}: token ids of shape {tuple(ids.shape)}",
                "[batch, tokens], one or more of each",
                "pass ids[None]",
            )
        if self.positions is not None and ids.shape[-1] > self.positions:
            raise ConversionError(
                f"{place}: {ids.shape[-1]} tokens for a model of {self.positions} positions",
                f"windows of {self.positions} or less",
                "pass a smaller length",
            )
        self._check_range(ids, f"{place}: a token id", "use the tokenizer of this model")

    def _check_labels(self, labels: Tensor, ids: Tensor, place: str) -> None:
        if labels.shape != ids.shape:
            raise ConversionError(
                f"{place}: labels of shape {tuple(labels.shape)} for input_ids of shape {tuple(ids.shape)}",
                "equal shapes",
                "pass the ids themselves as labels; the model shifts them",
            )
        self._check_range(
            labels[labels != _IGNORED], f"{place}: a label", f"mark positions without one by {_IGNORED}"
        )

    def _check_range(self, ids: Tensor, what: str, advice: str) -> None:
        assert self.vocabulary is not None
        outside = ids[(ids < 0) | (ids >= self.vocabulary)].unique().tolist()
        unknown = [one for one in outside if one not in self.placeholders]
        if unknown:
            raise ConversionError(
                f"{what} of {unknown[0]}",
                f"0 to {self.vocabulary - 1}, the model's vocabulary",
                advice,
            )


def _configured(config: Any) -> int | None:
    """Return the positions that a configuration names, or None where they are relative or recurrent."""
    if (
        getattr(config, "alibi", None)
        or getattr(config, "relative_attention_num_buckets", None)
        or (
            getattr(config, "relative_attention", None) and not getattr(config, "position_biased_input", True)
        )
    ):
        return None
    named = (getattr(config, name, None) for name in _POSITIONS)
    positions = next((one for one in named if isinstance(one, int) and one > 0), None)
    if positions is None:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    scalings = [scaling, *scaling.values()] if isinstance(scaling, Mapping) else []
    reached = [
        int(one["factor"] * (one.get("original_max_position_embeddings") or positions))
        for one in scalings
        if isinstance(one, Mapping) and isinstance(one.get("factor"), (int, float))
    ]
    return max([positions, *reached])


def _tables(model: nn.Module) -> Iterator[int]:
    """Yield the usable rows of tables of positions beside the embedding of tokens."""
    embedding = _token_embedding(model)
    for module in model.modules():
        children = dict(module.named_children())
        if embedding is None or all(child is not embedding for child in children.values()):
            continue
        for name in _TABLES:
            table = children.get(name)
            if isinstance(table, nn.Embedding):
                # OPT and BART leave two rows free; RoBERTa and its like count on from the row of padding.
                after_padding = 0 if table.padding_idx is None else table.padding_idx + 1
                offset = getattr(table, "offset", after_padding)
                yield table.num_embeddings - (offset if isinstance(offset, int) else 0)


def _token_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # a model that reads no tokens
        return None
    return embedding if isinstance(embedding, nn.Module) else None
