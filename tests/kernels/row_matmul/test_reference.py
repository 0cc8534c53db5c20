"""The reference of the product with a table."""

from __future__ import annotations

import torch

from dbf_compile.kernels.row_matmul import reference
from dbf_compile.rows import ROW_FORMATS, dequantize_rows, quantize_rows


def test_parts_make_the_whole(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    form = ROW_FORMATS["int4"]
    table = quantize_rows(torch.randn(50, 33), form)
    dense = dequantize_rows(table, 33, form, torch.float64)
    x, grad = torch.randn(4, 33, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    monkeypatch.setattr(reference, "_CHUNK", 16 * 33)
    assert torch.allclose(reference.row_matmul(x, table, None, form), x @ dense.T)
    assert torch.allclose(reference.row_matmul_transposed(grad, table, 33, form), grad @ dense)
    assert reference.row_matmul(x, table[:0], None, form).shape == (4, 0)
