"""Compiled products with tables: one graph, the kernel's own bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dbf_compile.tables import quantize_tables, swap_tables_


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 24), nn.Linear(24, 50)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.tokens(ids)))


@pytest.mark.parametrize(
    ("backend", "kind", "dtype"),
    [
        ("dbf", "int8", torch.bfloat16),
        pytest.param("dbf", "int4", torch.float32, marks=pytest.mark.slow),
        pytest.param("dbf", "int6", torch.float16, marks=pytest.mark.slow),
        ("inductor", "int8", torch.bfloat16),
    ],
)
def test_one_graph_computes_what_the_layers_do(backend: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = Tied().requires_grad_(False).to(dtype)
    swap_tables_(model, quantize_tables(model, {"tokens": kind, "head": kind}))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for ids in (torch.randint(0, 50, (1, 1)), torch.randint(0, 50, (2, 7))):
        y, expected = compiled(ids), model(ids)
        assert y.dtype == expected.dtype
        # Inductor does not round between operations that it fuses.
        assert (y - expected).double().norm() <= 2 * torch.finfo(dtype).eps * expected.double().norm()
