"""The operators of torch around the C++ kernels, called with random tensors, right ones and wrong ones.

    soak_operators.py                   builds the kernels
    soak_operators.py <seed> <seconds>  calls them for so long, in time of the processor; exits with 1 where a result is wrong

Right tensors are of any layout and of sizes from none to many; results are compared with the references in float64. Wrong ones
are refused, or have results of some kind: a sanitizer sees what is read beside them. See ``soak_sanitizers``.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.cached_attention import cpu_kernel as attention_kernel
from dbf_compile.kernels.cached_attention.reference import cached_attention
from dbf_compile.kernels.row_matmul import cpu_kernel as row_kernel
from dbf_compile.kernels.row_matmul.reference import row_matmul
from dbf_compile.kernels.sign_matmul import cpu_kernel as sign_kernel
from dbf_compile.kernels.sign_matmul.reference import sign_matmul
from dbf_compile.rows import RowFormat, dequantize_rows, quantize_rows

KERNELS = (sign_kernel, row_kernel, attention_kernel)
NARROW = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # a result's last place
TERMS = 1 << 21  # of a product
NATIVE = torch.ops.dbf_native


class Draw:
    """Random sizes and tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, most: int) -> int:
        """Draw a size: small ones are as likely as large ones."""
        return min(most, int(2 ** self.random.uniform(0, most.bit_length())))

    def some(self, *values: Any) -> Any:
        """Draw one of these."""
        return self.random.choice(values)

    def dtype(self) -> torch.dtype:
        """Draw a dtype of activations."""
        chosen: torch.dtype = self.some(*NARROW)
        return chosen

    def shape(self, most: int) -> list[int]:
        """Draw leading dimensions of at most so many rows, now and then of none."""
        rows = self.size(most)
        kinds = [[rows], [1, rows], [rows, 1, 1], [2, rows // 2 + 1], []]
        if self.random.random() < 0.1:
            kinds = [[0], [3, 0], [0, 5]]
        kind: list[int] = self.some(*kinds)
        return kind

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw a tensor of any layout."""
        return self.layout(torch.randn(*shape, generator=self.generator).to(dtype))

    def words(self, *shape: int) -> Tensor:
        """Draw int32 words of any layout."""
        return self.layout(
            torch.randint(-(2**31), 2**31, shape, generator=self.generator, dtype=torch.int64).int()
        )

    def layout(self, tensor: Tensor) -> Tensor:
        """Return the same numbers in memory of another layout; the last lie at the end of what was allocated."""
        kind = self.some("plain", "plain", "transposed", "strided", "offset")
        if kind == "transposed" and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "strided" and tensor.dim() > 0:
            return torch.stack([tensor, tensor], -1)[..., 1]
        if kind == "offset":
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        return tensor

    def maybe(self, tensor: Tensor) -> Tensor | None:
        """Return the tensor or None."""
        chosen: Tensor | None = self.some(tensor, None)
        return chosen


def near(y: Tensor, exact: Tensor, tolerance: Tensor) -> bool:
    """Return whether a result is within a tolerance, and the rounding of its dtype."""
    error = (y.double() - exact).abs()
    return bool((error <= tolerance + NARROW[y.dtype] * exact.abs() + 2.0**-24).all())


def check_signs(draw: Draw) -> bool:
    """One product, or two by a call for a whole layer, which must have the same bits."""
    columns, rows = draw.size(4096), draw.size(1 << 14)
    x = draw.normal(*draw.shape(max(1, min(1 << 16, TERMS // (columns * rows)))), columns, dtype=draw.dtype())
    signs, vector = draw.words(rows, -(-columns // 32)), draw.dtype()
    settings = {"interleaved": draw.some(True, False), "fast": draw.some(True, False)}
    scales = [draw.maybe(draw.normal(size, dtype=vector)) for size in (columns, rows, rows)]
    y = sign_kernel.sign_matmul_cpu(x, signs, *scales, dtype=draw.dtype(), **settings)
    wide = [None if scale is None else scale.double() for scale in scales]
    exact = sign_matmul(x.double(), signs, *wide, dtype=torch.float64, interleaved=settings["interleaved"])
    scaled = x.double() if wide[0] is None else x.double() * wide[0]
    rounding = columns * scaled.abs().amax(-1, keepdim=True) * (2.0**-13 if settings["fast"] else 2.0**-21)
    after = torch.ones(rows, dtype=torch.float64) if wide[1] is None else wide[1].abs()
    return near(y, exact, rounding * after) and check_layers(draw, x)


def check_layers(draw: Draw, x: Tensor) -> bool:
    """Layers of one input: prepared, whole, and product by product they have the same bits."""
    columns, interleaved, fast = x.shape[-1], draw.some(True, False), draw.some(True, False)
    factors, biases, alone = [], [], []
    with_bias, dtype = draw.some(True, False), draw.dtype()
    for _ in range(draw.size(3)):
        middle, rows = draw.size(128), draw.size(256)
        signs = [draw.words(middle, -(-columns // 32)), draw.words(rows, -(-middle // 32))]
        scales = [draw.normal(size, dtype=draw.dtype()).contiguous() for size in (columns, middle, rows)]
        bias = draw.normal(rows).contiguous() if with_bias else None
        own = [*(words.contiguous() for words in signs), *scales]
        factors += own
        biases += [bias] if bias is not None else []
        out = x.new_full((*x.shape[:-1], rows), torch.nan, dtype=dtype)
        NATIVE.double_binary_linear.out(
            x.contiguous(), *own, bias, interleaved=interleaved, fast=fast, out=out
        )
        middle_y = sign_kernel.sign_matmul_cpu(x, signs[0], scales[0], interleaved=interleaved, fast=fast)
        y = sign_kernel.sign_matmul_cpu(
            middle_y, signs[1], scales[1], scales[2], bias, dtype, interleaved, fast
        )
        if not torch.equal(y, out):
            return False
        alone.append(out)
    sizes = [tensor.numel() for tensor in (*factors, *biases) if tensor.dim() == 1]
    space = torch.empty(
        32 + 64 * (len(factors) // 5) + sum(4 * size + 64 for size in sizes), dtype=torch.uint8
    )
    prepared = sign_kernel.prepare_layers_cpu(factors, biases, interleaved, space)
    together = torch.cat(alone, -1)
    y = torch.full_like(together, torch.nan)
    NATIVE.prepared_layers.out(x.contiguous(), prepared, fast=fast, out=y)
    return torch.equal(y, together)


def check_rows(draw: Draw) -> bool:
    """A product with a table of any format."""
    form = RowFormat(*draw.some((8, 0), (6, 64), (4, 32), (8, 12), (6, 16), (4, 8), (4, 0), (6, 0)))
    columns, rows = draw.size(2048), draw.size(1 << 14)
    shape = draw.shape(max(1, min(1 << 16, TERMS // (columns * rows))))
    weight = torch.randn(rows, columns, generator=draw.generator)
    # What writes tables knows their usual formats; the words of the others are random, their scales some.
    usual = (form.bits, form.group) in ((8, 0), (6, 64), (4, 32))
    table = quantize_rows(weight, form) if usual else draw.words(rows, form.words(columns)) & 0x3FFF3FFF
    x = draw.normal(*shape, columns, dtype=draw.some(*NARROW, torch.float64))
    bias = draw.maybe(draw.normal(rows, dtype=draw.dtype()))
    y = row_kernel.row_matmul_cpu(x, draw.layout(table), bias, form, draw.dtype())
    wide = x.float().double()
    exact = row_matmul(wide, table, None if bias is None else bias.double(), form)
    sizes = dequantize_rows(table, columns, form).double().abs().sum(-1)
    return near(y, exact, wide.abs().amax(-1, keepdim=True) * sizes * 2.0**-18)


def check_attention(draw: Draw) -> bool:
    """Attention over a cache whose rest is no number."""
    B, heads, group, tokens = draw.size(3), draw.size(4), draw.size(4), draw.size(64) * draw.some(1, 1, 1, 0)
    D, V, L = draw.size(128), draw.size(128), draw.size(512)
    tokens = min(tokens, TERMS // (B * heads * group * (D + V) * L) + 1)
    dtype = draw.dtype()
    q = draw.normal(B, heads * group, tokens, D, dtype=dtype)
    keys, values = draw.normal(B, heads, D, L, dtype=dtype), draw.normal(B, heads, L, V, dtype=dtype)
    positions = draw.layout(torch.randint(0, L, (B, tokens), generator=draw.generator))
    if tokens:
        for row, last in enumerate(positions.amax(-1).tolist()):
            keys[row, :, :, last + 1 :] = torch.nan
            values[row, :, last + 1 :] = torch.nan
    settings = (D**-0.5, draw.some(0, 0, draw.size(64)), draw.some(0.0, 20.0))
    y = attention_kernel.cached_attention_cpu(q, keys, values, positions, *settings)
    if not tokens:
        return y.shape == (B, 0, heads * group, V)
    exact = cached_attention(q.double(), keys.double(), values.double(), positions, *settings)
    return near(y, exact, values.double().nan_to_num(0).abs().amax() * 2.0**-18)


def check_wrong_tensors(draw: Draw) -> bool:
    """A call in which one or two arguments are spoilt: an error, or whatever stays within bounds."""
    rows, columns, middle = draw.size(70), draw.size(70), draw.size(70)
    x, out = draw.normal(3, columns).contiguous(), torch.empty(3, rows)
    signs = [torch.zeros(rows, -(-columns // 32)), torch.zeros(middle, -(-columns // 32))]
    signs += [torch.zeros(rows, -(-middle // 32))]
    whole, inner, outer = (words.int() for words in signs)
    layer = [inner, outer, torch.ones(columns), torch.ones(middle), torch.ones(rows)]
    space = torch.empty(draw.some(0, 1, 31, 32, 96, 200, 4096), dtype=torch.uint8)
    D, L = draw.size(40), draw.size(40)
    calls: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = [
        (NATIVE.sign_matmul.out, [x, whole, torch.ones(columns), torch.ones(rows)], {"interleaved": True}),
        (NATIVE.double_binary_linear.out, [x, *layer, torch.ones(rows)], {"fast": True}),
        (NATIVE.prepared_layers.out, [x, space], {}),
        (NATIVE.row_matmul.out, [x, torch.zeros(rows, -(-columns // 4) + 1).int()], {"bits": 8, "group": 0}),
        (
            NATIVE.cached_attention.out,
            [
                torch.ones(1, 2, 3, D),
                torch.ones(1, 1, D, L),
                torch.ones(1, 1, L, D),
                torch.zeros(1, 3).long(),
            ],
            {"scale": 1.0},
        ),
    ]
    call, tensors, settings = draw.some(*calls)
    out = torch.empty(1, 3, 2, D) if call is NATIVE.cached_attention.out else out
    if draw.some(True, False, False):
        call, tensors, settings, out = NATIVE.prepare_layers.out, layer, {"interleaved": False}, space
    for _ in range(draw.some(1, 1, 2)):
        place = draw.random.randrange(len(tensors) + 1)
        if place == len(tensors):
            out = spoilt(draw, out)
        else:
            tensors[place] = spoilt(draw, tensors[place])
    if "bits" in settings:
        settings |= {"bits": draw.some(8, 6, 4, 0, -8, 64), "group": draw.some(0, 4, -4, 1 << 40)}
    arguments = [tensors, []] if call is NATIVE.prepare_layers.out else tensors
    with contextlib.suppress(RuntimeError, TypeError, NotImplementedError, IndexError):
        call(*arguments, **settings, out=out)
    return True


def spoilt(draw: Draw, tensor: Tensor) -> Tensor:
    """Return a tensor of another size, dtype or layout, or with other numbers."""
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor.to(draw.some(torch.float64, torch.int8, torch.bool, torch.int64, torch.bfloat16)),
        lambda: tensor[..., :-1].contiguous() if tensor.dim() else tensor,
        lambda: tensor[:-1] if tensor.dim() else tensor,
        lambda: torch.cat([tensor, tensor], 0) if tensor.dim() else tensor,
        lambda: tensor.unsqueeze(0),
        lambda: tensor.flatten(),
        lambda: tensor.transpose(0, -1) if tensor.dim() > 1 else tensor,
        lambda: tensor.new_empty(0),
        lambda: tensor.new_zeros(()),
        lambda: tensor[..., :1].expand(tensor.shape) if tensor.dim() else tensor,
        lambda: (
            torch.full_like(tensor, draw.some(-1, 1 << 20, 127)) if tensor.dtype != torch.uint8 else tensor
        ),
        lambda: tensor.to("meta"),
    ]
    way: Callable[[], Tensor] = draw.some(*ways)
    return way()


CHECKS = (check_signs, check_rows, check_attention, check_wrong_tensors)


def main(seed: int, seconds: float) -> int:
    """Call operators for so many seconds; return the exit code."""
    if not all(kernel.library.available() for kernel in KERNELS):
        return 1
    begin = time.process_time()
    wrong: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    case = seed * 1_000_000
    while time.process_time() - begin < seconds:
        draw = Draw(case)
        torch.set_num_threads(draw.some(1, 1, 2, 3))
        check = draw.some(*CHECKS)
        if not check(draw):
            wrong[check.__name__] += 1
            print(f"  wrong: {check.__name__}, case {case}")
        calls[check.__name__] += 1
        case += 1
    for name, count in sorted(calls.items()):
        print(f"{name.removeprefix('check_')}: {wrong[name]} of {count} calls wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(main(int(sys.argv[1]), float(sys.argv[2])))
    for kernel in KERNELS:
        cpp_build.build(kernel.library.source)
