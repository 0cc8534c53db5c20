"""What :mod:`support.cuda.codegen` compiles: layers among what stands around them in models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.models.architectures import SHARPER
from support.models.tiny import tiny_llama
from support.strategies import random_factors, random_factors_like, random_signs

from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.signs import interleave, pack_signs

LLAMA_BLOCKS = 2
CACHED_TOKENS = 256


class Siblings(torch.nn.Module):
    """Three layers that were factored as one and have their first stage in common, as q, k and v.

    Args:
        apart: return their results as they are; else one behind the other.
    """

    ROWS = (33, 320, 96)

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_siblings(256, 192, self.ROWS))
        self.apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        found = [layer(x) for layer in self.layers]
        return found if self.apart else torch.cat(found, dim=-1)


def _siblings(K: int, R: int, rows: Sequence[int]) -> list[DoubleBinaryLinear]:
    """Return layers that were factored as one."""
    return [DoubleBinaryLinear(factors) for factors in random_factors(K, R, sum(rows)).split(rows)]


class Deep(torch.nn.Module):
    """Two layers of many columns: one token's sums stay in parts, for the next layer or the activation to add up.

    Args:
        both: return what is between the layers, too; else the activation becomes part of the first layer's kernel.
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
    """Products of many tokens with rows scaled: to the dtype of x and others; one without scale; one of words row after row."""

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
    """Two products with signs, where somebody writes to what is between them."""

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
    """Half a block of a Llama: a norm, three factored layers, the activation between them, and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(256)
        self.gate, self.up = (DoubleBinaryLinear(random_factors(256, 192, 512)) for _ in range(2))
        self.down = DoubleBinaryLinear(random_factors(512, 192, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(z)) * self.up(z))


def llama(factored: bool) -> torch.nn.Module:
    """Return a model of transformers, random but always the same; all its layers but the head are factored, or none is.

    What comes out of attention's layers is summed over more columns than one program adds up.
    """
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 320,
    }  # heads of 64, as large models have
    model = tiny_llama(LLAMA_BLOCKS, **sizes, max_position_embeddings=CACHED_TOKENS, pad_token_id=None)
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
    """Return random layers in the place of dense ones that read the same input, factored as one."""
    weight = torch.cat([layer.weight.detach() for layer in dense])
    rows = [layer.out_features for layer in dense]
    return [DoubleBinaryLinear(part) for part in random_factors_like(weight, mid_features).split(rows)]
