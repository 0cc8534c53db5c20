"""What the dense model predicts: its likeliest tokens at every position and some others, computed once and kept on the disk.

    <folder>/<key>.safetensors         "tokens" [1, positions, top + drawn] int32, or uint16 if the vocabulary is that small:
                                             the likeliest, then others, drawn by their probabilities
                                         "log_p" float16 of the same shape
                                         "rest" float32 [1, positions]: probability of all tokens but the likeliest

The key is a hash of the dense model's content, of the tokens of a window, of ``top`` and of the format. So runs with other bits or other
settings read the same files, a run that goes on finds what it had, and a damaged file is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dbf_compile.calibration.model_io import logits_of
from dbf_compile.checkpoint import write_tensors
from dbf_compile.checksums import changed_tensors
from dbf_compile.finetuning.loss import Targets
from dbf_compile.hashes import tensor_hash

_FORMAT = {"format": "dbf targets", "format_version": "3"}
_SMALL = 2**16  # tokens that 16 bits tell apart
_DRAWN = 32


class Teacher:
    """Gives the predictions of the dense model, from the disk or from the model.

    Args:
        model: returns the dense model in evaluation mode; called only where a prediction is not known yet.
        content: hash of the dense model.
        top: how many of the likeliest tokens are kept at a position; all where the vocabulary is smaller.
        folder: where predictions lie; made if it is not there.
        device: where the model computes.
    """

    def __init__(
        self, model: Callable[[], nn.Module], content: str, top: int, folder: Path, device: torch.device
    ) -> None:
        self._model, self._content, self._top, self._folder = model, content, top, folder
        self.device = device

    def targets(self, windows: Tensor) -> Targets:
        """Return the predictions for windows of tokens, int64 [windows, length], position after position."""
        parts = [self._of(window[None]) for window in windows]
        return Targets(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _of(self, window: Tensor) -> Targets:
        """Return the predictions for a window [1, length]."""
        version = _FORMAT["format_version"]
        digest = hashlib.sha256(f"{version} {self._content} {self._top}".encode() + tensor_hash(window))
        name = digest.hexdigest()
        path = self._folder / name[:2] / f"{name[2:40]}.safetensors"
        tensors = _read(path)
        if tensors is None:
            tensors = self._computed(window, int(name[:15], 16))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(tensors, _FORMAT, path)
        log_p, rest = tensors["log_p"].to(self.device).float(), tensors["rest"].to(self.device)
        top = min(self._top, log_p.shape[-1])
        drawn = log_p.shape[-1] - top
        weight = log_p.exp()
        if drawn:
            weight[..., top:] = rest[..., None] / drawn
        total = weight.sum(-1, keepdim=True)  # which rounding moved
        tokens = tensors["tokens"].to(self.device).long()
        return Targets(*(part.flatten(0, 1) for part in (tokens, log_p - total.log(), weight / total)))

    @torch.no_grad()
    def hidden_states(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Return the hidden states of the dense model; nobody keeps them, as they take kilobytes a token."""
        output = self._model()(input_ids=windows.to(self.device), output_hidden_states=True)
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    @torch.no_grad()
    def _computed(self, window: Tensor, seed: int) -> dict[str, Tensor]:
        logits = logits_of(self._model()(input_ids=window.to(self.device)))
        log_p = torch.log_softmax(logits.float(), -1)
        tokens = log_p.topk(min(self._top, log_p.shape[-1])).indices
        others = log_p.exp().scatter_(-1, tokens, 0.0)
        rest = others.sum(-1)
        if tokens.shape[-1] < log_p.shape[-1]:
            tokens = torch.cat([tokens, _drawn(others, seed)], -1)
        narrow = torch.uint16 if log_p.shape[-1] <= _SMALL else torch.int32
        return {
            "tokens": tokens.to(torch.int32).cpu().to(narrow),
            "log_p": log_p.gather(-1, tokens).half().cpu(),
            "rest": rest.cpu(),
        }


def _drawn(p: Tensor, seed: int) -> Tensor:
    """Return tokens that are drawn by p, int64 [1, positions, drawn]; any where all are 0, as they count nothing there."""
    # Chances are the CPU's: not every device has a generator, and they would differ.
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(*p.shape[:-1], _DRAWN, generator=generator).to(p.device)
    sums = p.cumsum(-1)
    places = torch.searchsorted(sums, chances * sums[..., -1:], right=True)
    return places.clamp_(max=p.shape[-1] - 1)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file; None where it is not there, or not as it was written."""
    try:
        return None if changed_tensors(path) else load_file(path)
    except (OSError, SafetensorError, ValueError):
        return None
