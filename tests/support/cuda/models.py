"""The models that :mod:`support.cuda.codegen` compiles: factored layers and what surrounds them in real models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.models.architectures import SHARPER
from support.models.tiny import tiny_llama
from support.strategies import random_factors, random_factors_like, random_signs

from dbf_compile.factors import DoubleBinaryFactors
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.signs import interleave, pack_signs

CACHED_TOKENS = 256


class Siblings(torch.nn.Module):
    """Three layers that were factored as one and share their first stage, as q, k and v.

    Args:
        apart: return their results as they are; else concatenated.
    """

    ROWS = (33, 320, 96)

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_siblings(256, 192, self.ROWS))
        self.apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        results = [layer(x) for layer in self.layers]
        return results if self.apart else torch.cat(results, dim=-1)


def _siblings(K: int, R: int, rows: Sequence[int]) -> list[DoubleBinaryLinear]:
    """Return layers that were factored as one."""
    return _layers_of(random_factors(K, R, sum(rows)), rows)


def _layers_of(factors: DoubleBinaryFactors, rows: Sequence[int]) -> list[DoubleBinaryLinear]:
    """Return layers of so many rows that hold one first stage."""
    first, *others = (DoubleBinaryLinear(part) for part in factors.split(rows))
    for layer in others:
        layer.share_first_stage_(first)
    return [first, *others]


class Deep(torch.nn.Module):
    """Two layers of many columns: for one token split-K leaves partial sums, which the next layer or the activation adds.

    Args:
        both: also return the activation; else Inductor fuses it into the kernel of the first layer.
    """

    def __init__(self, both: bool) -> None:
        super().__init__()
        sizes = ((2100, 1090, 1060), (1060, 40, 70))
        self.first, self.second = (DoubleBinaryLinear(random_factors(*size)) for size in sizes)
        self.both = both

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        z = torch.relu(self.first(x))
        return (self.second(z), z) if self.both else self.second(z)


class Plain(torch.nn.Module):
    """Products of many tokens: with out_scale, to several dtypes; without out_scale; with words row by row."""

    SIZE = (48, 600)
    DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)

    def __init__(self) -> None:
        super().__init__()
        words = pack_signs(random_signs(*self.SIZE, seed=0))
        self.register_buffer("interleaved", interleave(words))
        self.register_buffer("in_rows", words)
        self.register_buffer("scale", torch.linspace(0.5, 2, self.SIZE[0]))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        product = torch.ops.dbf.sign_matmul
        scaled = {"out_scale": self.scale, "interleaved": True}
        return [
            *(product(x, self.interleaved, dtype=dtype, **scaled) for dtype in self.DTYPES),
            product(x, self.interleaved, interleaved=True),
            product(x, self.in_rows),
        ]


class Overwritten(torch.nn.Module):
    """Two products with signs, and a write to the result of the first in between."""

    SIZES = ((1090, 2100), (1060, 1090))

    def __init__(self) -> None:
        super().__init__()
        for index, size in enumerate(self.SIZES):
            self.register_buffer(f"signs{index}", interleave(pack_signs(random_signs(*size, seed=index))))
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.ops.dbf.sign_matmul(x, self.signs0, interleaved=True)
        h = h.index_put((h > 3,), self.zero)
        return torch.ops.dbf.sign_matmul(h, self.signs1, interleaved=True)


class Block(torch.nn.Module):
    """The MLP half of a Llama block: a norm, three factored layers, the activation between them, and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(256)
        self.gate, self.up = (DoubleBinaryLinear(random_factors(256, 192, 512)) for _ in range(2))
        self.down = DoubleBinaryLinear(random_factors(512, 192, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(z)) * self.up(z))


def llama(factored: bool) -> torch.nn.Module:
    """Return a random model of transformers, always the same; all its layers but the head are factored, or none is.

    In its one block stands all that a layer may follow: embedding and norm, attention, norm and residual, activation and
    product. The layers of attention have so many middle columns that split-K applies.
    """
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 320,
    }  # heads of 64, as large models have
    model = tiny_llama(1, **sizes, max_position_embeddings=CACHED_TOKENS, pad_token_id=None)
    for block in model.model.layers if factored else []:
        attention, mlp = block.self_attn, block.mlp
        attention.q_proj, attention.k_proj, attention.v_proj = _as_one(
            1090, attention.q_proj, attention.k_proj, attention.v_proj
        )
        for layer in (attention.q_proj, attention.k_proj):
            layer.scale_out *= SHARPER
        (attention.o_proj,) = _as_one(1090, attention.o_proj)
        mlp.gate_proj, mlp.up_proj = _as_one(192, mlp.gate_proj, mlp.up_proj)
        (mlp.down_proj,) = _as_one(192, mlp.down_proj)
    return model


def _as_one(mid_features: int, *dense: torch.nn.Linear) -> list[DoubleBinaryLinear]:
    """Return random layers, factored as one, for dense layers of the same input."""
    weight = torch.cat([layer.weight.detach() for layer in dense])
    rows = [layer.out_features for layer in dense]
    return _layers_of(random_factors_like(weight, mid_features), rows)
