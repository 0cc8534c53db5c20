"""Peers of bench_llm: language models whose weights are quantized in other ways, the same layers as ours.

| peer | protocol |
|---|---|
| round to nearest | a grid of 2^b levels between the extremes of a group |
| GPTQ | own implementation of the published algorithm on the same grids: columns in the order of falling curvature, damping 1 %, inputs from the quantized prefix, all layers of a block at once. The package gptqmodel asks for another torch than ours |
| HQQ | Quantizer of the package hqq, its defaults, 16 bits for each scale and zero |
| AutoRound | the package auto-round, 200 steps a block, asymmetric |
| GLQ E8, GLQ trellis | codes of the package glq (lattice, QTIP), a layer at a time with the same inputs as GPTQ |
| OneBit | one sign a weight and magnitudes of rank one, fitted with our importance |

Stored bits are those of the factored layers: b bits a weight, and a scale of 16 and a zero of b bits a group; GLQ's are b, and 16
a row and a column. At one bit a grid is a sign and a mean magnitude. All leave embedding, head and norms as they are in the
dense model; ours stores embedding and head in 8 bits. Packages that are not installed are left out: `make bench-llm` asks pip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from factorizer_peers import GROUP, hqq
from torch import Tensor, nn

import dbf_compile
from dbf_compile.calibration.offload import blocks_of
from dbf_compile.calibration.streams import record
from dbf_compile.compression.layers import LayerFactorizer
from dbf_compile.factorizer.projection import onebit
from dbf_compile.linear import dense_linears, dense_weight

DAMPING, COLUMNS = 0.01, 128  # of GPTQ: share of the mean curvature; columns between updates of all others


class Grid(NamedTuple):
    """Levels of a group of weights in a row."""

    bits: int
    group: int

    def stored_bits(self, weight: Tensor) -> int:
        rows, columns = weight.shape
        groups = -(-columns // self.group)
        zero = self.bits if self.bits > 1 else 0
        return rows * (columns * self.bits + groups * (16 + zero))


# By the bits that are asked for. Groups of 192 divide the rows of SmolLM2; they take at most 9 % more than that.
GRIDS = {1.0: Grid(1, 192), 1.5: Grid(1, 32), 2.0: Grid(2, 192), 3.0: Grid(3, 192), 4.0: Grid(4, 192)}
GRIDS |= {2.5: Grid(2, GROUP), 3.5: Grid(3, GROUP), 4.5: Grid(4, GROUP)}  # the usual groups of 64


class Levels(NamedTuple):
    """Scale and zero of every weight [N, K], and the largest code; of signs the zero is one half."""

    scale: Tensor
    zero: Tensor
    most: int

    def nearest(self, weight: Tensor, column: int | slice = slice(None)) -> Tensor:
        """Return the nearest levels to weights of these columns."""
        scale, zero = self.scale[:, column], self.zero[:, column]
        return ((weight / scale + zero).round().clamp(0, self.most) - zero) * scale


def levels_of(weight: Tensor, grid: Grid) -> Levels:
    """Return the levels of a weight [N, K], group by group; the last group of a row may be shorter."""
    scale, zero = torch.empty_like(weight), torch.empty_like(weight)
    most = 2**grid.bits - 1
    for start in range(0, weight.shape[1], grid.group):
        part = weight[:, start : start + grid.group]
        place = (slice(None), slice(start, start + grid.group))
        if most == 1:
            scale[place] = (2 * part.abs().mean(1, keepdim=True)).half().float().clamp_min(1e-7)
            zero[place] = 0.5
            continue
        low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
        step = ((high - low) / most).half().float().clamp_min(1e-7)
        scale[place], zero[place] = step, (-low / step).round().clamp(0, most)
    return Levels(scale, zero, most)


def gptq(weight: Tensor, curvature: Tensor, grid: Grid) -> Tensor:
    """Return a weight [N, K] on the levels of a grid, columns one after the other, each making up for those before.

    Args:
        weight: float32.
        curvature: E[x xᵀ] [K, K] of the layer's inputs.
        grid: its levels are those of the weight as it was.
    """
    levels, columns = levels_of(weight, grid), weight.shape[1]
    order = curvature.diagonal().argsort(descending=True)
    back = order.argsort()
    rest = weight[:, order].clone()
    levels = Levels(levels.scale[:, order], levels.zero[:, order], levels.most)
    curvature = curvature[order][:, order].double()
    curvature = curvature + DAMPING * curvature.diagonal().mean().clamp_min(1e-12) * torch.eye(columns)
    inverse = torch.linalg.cholesky(curvature.inverse(), upper=True).float()
    result = torch.empty_like(rest)
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors = torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            result[:, column] = levels.nearest(rest[:, column], column)
            error = (rest[:, column] - result[:, column]) / inverse[column, column]
            rest[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    return result[:, back]


Approximation = tuple[Tensor, int]  # of a weight, and its stored bits


class Peer(NamedTuple):
    """A way to quantize a model.

    Args:
        approximate: (weight [N, K], E[x xᵀ] or None, bits) to an approximation and its bits.
        bits: those it is made for.
        package: what has to be installed, or None.
        calibrated: whether it reads text.
    """

    approximate: Callable[[Tensor, Any, float], Approximation]
    bits: Sequence[float]
    package: str | None = None
    calibrated: bool = True

    @property
    def installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


def _rounded(weight: Tensor, _: Any, bits: float) -> Approximation:
    grid = GRIDS[bits]
    return levels_of(weight, grid).nearest(weight), grid.stored_bits(weight)


def _hqq(weight: Tensor, _: Any, bits: float) -> Approximation:
    grid = GRIDS[bits]
    quantized = hqq(weight, grid.bits, grid.group)
    assert quantized is not None
    return quantized, weight.numel() * grid.bits + 32 * (weight.numel() // grid.group)


def _gptq(weight: Tensor, curvature: Any, bits: float) -> Approximation:
    return gptq(weight, curvature, GRIDS[bits]), GRIDS[bits].stored_bits(weight)


def _glq(variant: str) -> Callable[[Tensor, Any, float], Approximation]:
    books: dict[int, Any] = {}  # by bits; each takes seconds to make

    def approximate(weight: Tensor, curvature: Any, bits: float) -> Approximation:
        from glq.codebook import E8ShellCodebook
        from glq.quantize_model import quantize_layer_e8_shell_rht
        from glq.trellis import TrellisCodebook

        whole = int(bits)
        if whole not in books:
            books[whole] = (
                TrellisCodebook("3inst", K=whole) if variant == "trellis" else E8ShellCodebook(verbose=False)
            )
        damped = curvature + DAMPING * curvature.diagonal().mean() * torch.eye(len(curvature))
        result = quantize_layer_e8_shell_rht(
            weight, curvature if variant == "trellis" else damped, books[whole], bpw=whole
        )
        return result[0], weight.numel() * whole + 16 * sum(weight.shape)

    return approximate


def _onebit(weight: Tensor, importance: Any, _: float) -> Approximation:
    single = onebit(weight, importance)
    return single.dense(), single.bits()


_INTEGERS = (2.0, 3.0, 4.0)
PEERS = {
    "round to nearest": Peer(_rounded, tuple(GRIDS), calibrated=False),
    "HQQ": Peer(_hqq, tuple(GRIDS), "hqq", calibrated=False),
    "GPTQ": Peer(_gptq, tuple(GRIDS)),
    "AutoRound": Peer(_rounded, (2.0, 3.0, 4.0, 2.5, 3.5, 4.5), "auto_round"),
    "GLQ E8": Peer(_glq("e8"), _INTEGERS, "glq"),
    "GLQ trellis": Peer(_glq("trellis"), _INTEGERS, "glq"),
    "OneBit": Peer(_onebit, (1.0,)),
}


def quantized(
    method: str, dense: nn.Module, tokenizer: Any, batches: Sequence[Any], bits: float
) -> tuple[nn.Module, float]:
    """Return a copy of a model whose weights are quantized, and its stored bits a weight.

    Args:
        method: one of ``PEERS``.
        dense: float32; left as it was.
        tokenizer: of the model.
        batches: windows of tokens to calibrate with.
        bits: asked for; see ``GRIDS``.
    """
    model = copy.deepcopy(dense)
    layers = dense_linears(model)
    jobs = LayerFactorizer(dbf_compile.CompressionConfig(progress=False)).jobs(model)
    names = [name for job in jobs for name in job.names]
    peer = PEERS[method]
    if method == "AutoRound":
        stored = _auto_round(model, tokenizer, batches, {name: layers[name] for name in names}, GRIDS[bits])
    elif method == "OneBit":
        importance = dbf_compile.calibrate(dense, batches, progress=False)
        stored = sum(_replace(layers[name], peer, importance.get(name), bits) for name in names)
    elif not peer.calibrated:
        stored = sum(_replace(layers[name], peer, None, bits) for name in names)
    else:
        stored = _block_by_block(model, batches, names, peer, bits)
    return model, stored / sum(dense_weight(layers[name]).numel() for name in names)


@torch.no_grad()
def _replace(layer: nn.Module, peer: Peer, knowledge: Any, bits: float) -> int:
    """Quantize one layer, and return its stored bits."""
    weight = dense_weight(layer)
    approximation, stored = peer.approximate(weight.detach().float(), knowledge, bits)
    weight.copy_(approximation)
    return stored


@torch.no_grad()
def _block_by_block(
    model: nn.Module, batches: Sequence[Any], names: Sequence[str], peer: Peer, bits: float
) -> int:
    """Quantize the layers of one block after the other, with the curvature of inputs from the quantized prefix."""
    blocks, layers, stored = blocks_of(model, names), dense_linears(model), 0
    streams = record(model, list(blocks.values()), batches)
    hidden = streams.hidden
    for index, (name, block) in enumerate(blocks.items()):
        inside = {one: layers[one] for one in names if one.startswith(f"{name}.")}
        curvatures = _curvatures(inside, partial(streams.outputs, block, index, hidden))
        stored += sum(_replace(layer, peer, curvatures[one], bits) for one, layer in inside.items())
        hidden = streams.outputs(block, index, hidden)
    return stored


def _curvatures(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """Return E[x xᵀ] of the inputs of layers while something runs; layers that read one tensor share the sum."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    run()
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _auto_round(
    model: nn.Module, tokenizer: Any, batches: Sequence[Any], layers: Mapping[str, nn.Module], grid: Grid
) -> int:
    from auto_round import AutoRound

    windows = [batch["input_ids"] for batch in batches]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=grid.bits,
        group_size=grid.group,
        sym=False,
        iters=200,
        dataset=windows,
        seqlen=windows[0].shape[1],
        nsamples=len(windows),
        batch_size=1,
        gradient_accumulate_steps=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize()
    return sum(grid.stored_bits(dense_weight(layer)) for layer in layers.values())
