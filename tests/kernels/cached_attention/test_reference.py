"""The reference of attention over a cache is torch's own attention under the mask that positions stand for."""

import torch

from dbf_compile.kernels.cached_attention.reference import cached_attention


def test_positions_and_windows_are_masks():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(2, 2, 10, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])
    index = torch.arange(10)
    for window in (0, 3):
        mask = index <= positions[..., None]
        mask &= index > positions[..., None] - (window or 100)
        exact = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, mask[:, None], scale=0.3, enable_gqa=True
        )
        y = cached_attention(q, keys.transpose(2, 3), values, positions, 0.3, window)
        torch.testing.assert_close(y, exact.transpose(1, 2), rtol=1e-12, atol=1e-12)
