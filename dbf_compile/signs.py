"""The bit layout of a sign matrix, and the only code that packs and unpacks it.

A matrix of ±1 with ``cols`` columns is stored as int32 words, row by row:

    column   0  1  2  …  31 | 32 33  …  63 | 64 …           bit 1 = +1, bit 0 = -1
    word     0              |  1           |  2              column c is bit c % 32 of word c // 32
    bit      0  1  2  …  31 |  0  1  …  31 |  0 …            (least significant bit first)

Bits past the last column are 0: equal matrices have equal words.

Kernels read 16 rows at once. For them the words of every full block of 16 rows are interleaved: word 0 of all 16 rows,
then word 1 of all 16, and so on. The rows of an incomplete last block stay stored one by one:

    rows     0 … 15                                     | 16 … 31 | … | the last rows % 16
    words    (0,0) (1,0) … (15,0) (0,1) (1,1) … (15,W)  | …       | … | row by row          (row, word)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbf_compile.errors import SignsError

WORD_BITS = 32
BLOCK_ROWS = 16
_WORD = 2**WORD_BITS - 1


def words_per_row(cols: int) -> int:
    """Return the number of 32-bit words that hold ``cols`` signs: ``ceil(cols / 32)``."""
    return -(-cols // WORD_BITS)


def pack_signs(signs: Tensor) -> Tensor:
    """Pack a matrix of ±1 into 32-bit words: ``[rows, cols]`` to ``[rows, ceil(cols / 32)]``.

    Args:
        signs: any real dtype, shape [rows, cols], every entry exactly +1 or -1.

    Returns:
        int32 words on the same device, contiguous.

    Raises:
        SignsError: not a matrix, not of numbers, or an entry is neither +1 nor -1 (NaN included).
    """
    if signs.dim() != 2:
        raise SignsError(
            f"signs of shape {tuple(signs.shape)}", "a matrix [rows, cols]", "reshape to two dimensions"
        )
    if signs.dtype == torch.bool or signs.is_complex():
        raise SignsError(f"signs of dtype {signs.dtype}", "real numbers", "map True to +1 and False to -1")
    positive = signs > 0
    if not bool(torch.all(positive | (signs < 0)) & torch.all(signs.abs() == 1)):
        raise SignsError(
            "a sign matrix with entries other than +1 and -1", "+1 and -1", "apply sign(), with sign(0) = +1"
        )
    rows, cols = signs.shape
    count = words_per_row(cols)
    bits = torch.zeros(rows, count * WORD_BITS, dtype=torch.int64, device=signs.device)
    bits[:, :cols] = positive
    place = torch.ones((), dtype=torch.int64, device=signs.device) << torch.arange(
        WORD_BITS, device=signs.device
    )
    return _as_words((bits.view(rows, count, WORD_BITS) * place).sum(-1))


def unpack_signs(words: Tensor, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack 32-bit words into a matrix of ±1: ``[rows, ceil(cols / 32)]`` to ``[rows, cols]``.

    Args:
        words: int32, shape [rows, ceil(cols / 32)], as :func:`pack_signs` returns them.
        cols: number of columns; the bits past the last one are ignored.
        dtype: of the result.

    Raises:
        SignsError: wrong dtype or number of words for ``cols`` columns.
    """
    check_words(words, cols)
    # Looking up eight signs at once takes a fifth of the time of shifting every bit into its place.
    places = torch.arange(8, dtype=torch.int32, device=words.device)
    signs_of_byte = 2 * ((torch.arange(256, device=words.device)[:, None] >> places) & 1) - 1
    octets = torch.stack([(words >> shift) & 255 for shift in range(0, WORD_BITS, 8)], dim=-1).flatten(1)
    return nn.functional.embedding(octets, signs_of_byte.to(dtype)).flatten(1)[:, :cols].contiguous()


def slice_columns(words: Tensor, first: int, last: int) -> Tensor:
    """Return the words of columns ``first`` to ``last - 1`` of packed signs: [rows, W] to [rows, ceil((last - first) / 32)].

    Args:
        words: int32, row by row, not interleaved.
        first: the first column; it need not begin a word.
        last: the column behind the last one.
    """
    count, start, shift = words_per_row(last - first), first // WORD_BITS, first % WORD_BITS
    wide = words[:, start : start + count + 1].long() & _WORD
    wide = nn.functional.pad(wide, (0, count + 1 - wide.shape[1]))
    result = (wide[:, :count] >> shift) | (wide[:, 1:] << (WORD_BITS - shift) & _WORD)
    if (last - first) % WORD_BITS:
        result[:, -1] &= (1 << (last - first) % WORD_BITS) - 1
    return _as_words(result)


def is_ragged(rows: int) -> bool:
    """Return whether the last 16-row block is incomplete; its rows are stored one by one."""
    return rows % BLOCK_ROWS != 0


def interleave(words: Tensor) -> Tensor:
    """Return packed words [rows, W] in the interleaved order that kernels read, in the same shape."""
    return _reordered(words, BLOCK_ROWS, words.shape[1])


def deinterleave(words: Tensor) -> Tensor:
    """Return interleaved words [rows, W] row by row; the inverse of :func:`interleave`."""
    return _reordered(words, words.shape[1], BLOCK_ROWS)


def _as_words(numbers: Tensor) -> Tensor:
    """Reinterpret unsigned 32-bit numbers, held as int64, as int32."""
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32).contiguous()


def _reordered(words: Tensor, outer: int, inner: int) -> Tensor:
    """Return a copy in which every full block of rows, viewed as [outer, inner], is transposed."""
    full = words.shape[0] - words.shape[0] % BLOCK_ROWS
    blocks = full // BLOCK_ROWS
    result = torch.empty_like(words, memory_format=torch.contiguous_format)
    result[:full].view(blocks, inner, outer).copy_(words[:full].reshape(blocks, outer, inner).transpose(1, 2))
    result[full:] = words[full:]
    return result


def check_words(words: Tensor, cols: int) -> None:
    """Raise SignsError unless ``words`` can hold a sign matrix of ``cols`` columns."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != words_per_row(cols):
        raise SignsError(
            f"packed signs of dtype {words.dtype} and shape {tuple(words.shape)} for {cols} columns",
            f"int32 [rows, {words_per_row(cols)}]",
            "pack with dbf_compile.signs.pack_signs",
        )


def padding_is_zero(words: Tensor, cols: int) -> bool:
    """Return whether the bits past the last of ``cols`` columns are all 0."""
    used = cols % WORD_BITS
    if used == 0 or words.numel() == 0:
        return True
    return bool(torch.all(words[:, -1] >> used == 0)) if used < 31 else bool(torch.all(words[:, -1] >= 0))
