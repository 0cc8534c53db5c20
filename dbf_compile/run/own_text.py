"""Text that the model writes itself to calibrate with: how much of it, and its windows as durable results of a run.

    <output>.work/text-<first row>.safetensors      "input_ids", int32 [rows, length]

A run that was stopped goes on behind the last file; processes that share the work write one file each at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dbf_compile.calibration.kinds import OWN_TEXT
from dbf_compile.calibration.mixture import Part
from dbf_compile.calibration.offload import blocks_of, offloaded
from dbf_compile.checkpoint import write_tensors
from dbf_compile.errors import OptionError
from dbf_compile.linear import dense_linears
from dbf_compile.options import CompressOptions, FinetuneConfig, Sampling
from dbf_compile.progress import bar
from dbf_compile.run.work import Work

if TYPE_CHECKING:
    from dbf_compile.run.writing import Writer

SHARE = 0.5  # of the windows, beside data
# Of a file, and of one step of writing: a cache of 16,384 tokens takes 0.4 GB of SmolLM2-135M, 2.1 GB of Llama-3-8B.
_TOKENS, _MOST_ROWS = 2**14, 64


@dataclass(frozen=True)
class OwnText:
    """Windows that a model is to write.

    Args:
        writer: the model, and how it writes.
        calibrating: windows to calibrate with.
        judging: windows to judge with.
    """

    writer: Writer
    calibrating: int
    judging: int

    @staticmethod
    def of(
        model: nn.Module,
        tokenizer: Any,
        config: CompressOptions | FinetuneConfig,
        length: int,
        windows: tuple[int, int],
    ) -> OwnText:
        """Return what a model is to write: windows of so many tokens, some to calibrate and some to judge with."""
        from dbf_compile.run.writing import Writer

        calibrating, judging = windows
        sampling = Sampling(
            temperature=config.own_temperature, top_k=config.own_top_k, seed=config.seed % 2**62
        )
        return OwnText(Writer.of(model, tokenizer, length, sampling), calibrating, judging)

    def fingerprint(self) -> str:
        """Return a hash of all that the windows depend on but the model."""
        return f"{self.writer.fingerprint()} {self.calibrating} {self.judging}"

    def part(self, work: Work, device: torch.device, progress: bool) -> Part:
        """Return the windows, each a batch on the CPU."""
        batches = [{"input_ids": row[None].long()} for row in self.windows(work, device, progress)]
        return Part.of(OWN_TEXT, "written by the model itself", batches, self.judging)

    def windows(self, work: Work, device: torch.device, progress: bool) -> Tensor:
        """Return the windows, int32 [windows, length], on the CPU; those that are not there yet are written."""
        length, total = self.writer.length, self.calibrating + self.judging
        rows = max(1, min(_TOKENS // length, _MOST_ROWS))
        files = {
            f"text-{first}.safetensors": range(first, min(first + rows, total))
            for first in range(0, total, rows)
        }
        with bar("writing text", total * length, "token", progress) as moving:
            maker = _Maker(self.writer, device, moving.update)
            for name, part in files.items():
                if not work.once_if_free(name, maker.of(part)):
                    moving.update(len(part) * length)
            ids = [load_file(work.once(name, maker.of(part)))["input_ids"] for name, part in files.items()]
        return torch.cat(ids)


@dataclass(frozen=True)
class _Maker:
    """Makes a file of text."""

    writer: Writer
    device: torch.device
    advance: Callable[[int], object]

    def of(self, rows: range) -> Callable[[Path], None]:
        """Return what writes the windows of some rows to a path."""

        def make(path: Path) -> None:
            write_tensors({"input_ids": self._written(rows).int()}, {"format": "dbf_text"}, path)

        return make

    def _written(self, rows: range) -> Tensor:
        model = self.writer.model
        with ExitStack() as stack:
            if next(model.parameters()).device != self.device:
                blocks = list(blocks_of(model, dense_linears(model)).values())
                stack.enter_context(offloaded(model, blocks, self.device))
            return self.writer.write(rows, self.advance)


def share_of(
    model: nn.Module, asked: float | None, data: Any, batches: Any = None, usual: float = SHARE
) -> float:
    """Return the share of the windows that a model is to write itself, 0 to 1.

    Args:
        model: the dense model.
        asked: the option ``own_text``.
        data, batches: what there is beside it, or None.
        usual: the share beside data where none is asked for.

    Raises:
        OptionError: it was asked for where there is no room for it.
        ConversionError: it was asked for, and the model writes no text.
    """
    from dbf_compile.run.writing import check_writes, writes

    if asked is None:
        if batches is not None or not writes(model):
            return 0.0
        return usual if data is not None else 1.0
    if not asked:
        return 0.0
    if batches is not None or (asked == 1 and data is not None):
        raise OptionError(
            f"own_text={asked} with {'data' if batches is None else 'batches'}",
            "less than 1 beside data, and none beside batches",
            "leave out what is not to be calibrated with",
        )
    check_writes(model)
    return asked if data is not None else 1.0
