"""Runs the Triton kernels of ``dbf::sign_matmul`` on a CPU and prints the error of every case.

Triton reads ``TRITON_INTERPRET`` when it is imported. So this file is a program, which :func:`run_all` starts with that
variable set; importing it does not import Triton.

A read or write past the end of a tensor kills the program: see :func:`_at_the_edge`.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cuda import triton_interpreter
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call: x is [*lead, K], signs are [N, K]; all scales and a bias, or none."""

    lead: tuple[int, ...]
    N: int
    K: int
    dtype: str = "float32"
    layout: str = "contiguous"
    result: str = "float32"
    scaled: bool = False
    fast: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("scaled", "fast") if getattr(self, name))
        shape = "x".join(map(str, (*self.lead, self.K)))
        return f"{shape}-to-{self.N}-{self.dtype}-{self.layout}-{self.result}{flags}"


@dataclass(frozen=True)
class Report:
    """The outcome of one case.

    Attributes:
        poisoned: outputs held NaN before the kernel ran.
        shape: shape of the result.
        dtype: dtype of the result.
        exact: integers came out exactly; float32 holds their sums.
        worst: max |y - truth| / bound for normally distributed x; rounding explains up to 1.
        worst_with_wrong_sign: the same against a truth with one sign changed.
        exact_with_other_tiles: integers came out exactly with other settings to tune over.
    """

    poisoned: bool
    shape: list[int]
    dtype: str
    exact: bool
    worst: float
    worst_with_wrong_sign: float
    exact_with_other_tiles: bool


DTYPES = ("float32", "bfloat16", "float16")
# One, primes, whole words and tiles, one more and one less than those.
SHAPES = (
    ((1,), 1, 1),
    ((3,), 2, 31),
    ((1,), 16, 32),
    ((2,), 17, 33),
    ((5,), 13, 127),
    ((4,), 16, 128),
    ((7,), 31, 131),
    ((1,), 37, 257),
    # More than 16 tokens go through tensor cores.
    ((17,), 1, 1),
    ((19,), 33, 31),
    ((23,), 70, 129),
    ((131,), 5, 64),
)
CASES = (
    *(Case(*shape, dtype) for shape, dtype in product(SHAPES, DTYPES)),
    *(
        Case((3, 5), 7, 45, dtype, layout)
        for dtype, layout in product(DTYPES, ("contiguous", "transposed", "sliced", "expanded"))
    ),
    *(
        Case(lead, 35, 97, dtype, result=result, scaled=True)
        for lead, dtype, result in product(((3,), (2, 11)), DTYPES, DTYPES)
    ),
    # More than 128 of 16 bits are multiplied by a dense matrix.
    *(Case((150,), 35, 97, dtype, result=result, scaled=True) for dtype, result in product(DTYPES, DTYPES)),
    Case((130,), 3, 4200, "bfloat16", result="bfloat16", scaled=True),
    Case((130,), 35, 1100, "bfloat16", result="bfloat16", scaled=True),
    Case((130,), 32, 600, "float16", result="float16"),
    Case((130,), 5, 0, "bfloat16"),
    *(Case(lead, 35, 97, scaled=True, fast=True) for lead in ((3,), (22,))),
    Case((), 5, 40),
    Case((0,), 5, 40),
    Case((2, 0), 5, 40, "float16"),
    Case((3,), 0, 40),
    Case((3,), 5, 0),
)


def run_all() -> dict[str, Any]:
    """Run all cases in a process of their own, where Triton interprets.

    Returns:
        ``reports`` by case, and ``not_finite``: cases where infinities or NaN differ from those of the reference.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"the interpreter ended with {done.returncode}; the last case is at fault:\n{done.stderr[-4000:]}"
        )
    results: dict[str, Any] = json.loads(done.stdout)
    results["reports"] = {name: Report(**fields) for name, fields in results["reports"].items()}
    return results


def _report(case: Case, other_settings: bool = True) -> Report:
    from dbf_compile.kernels.sign_matmul.triton_kernel import sign_matmul_triton
    from dbf_compile.signs import interleave, pack_signs

    signs = torch.randint(0, 2, (case.N, case.K)) * 2 - 1
    words = _at_the_edge(interleave(pack_signs(signs)))
    wrong_signs = signs.clone()
    wrong_signs[-1:, -1:] *= -1
    # Powers of two, so that integers stay exact.
    powers = (0.5, 1.0, 2.0)
    in_scale = torch.tensor(powers)[torch.randint(0, 3, (case.K,))] if case.scaled else None
    out_scale = torch.tensor(powers)[torch.randint(0, 3, (case.N,))] if case.scaled else None
    bias = torch.randint(-8, 9, (case.N,)).float() if case.scaled else None
    vectors = [None if v is None else _at_the_edge(v.to(torch.float16)) for v in (in_scale, out_scale, bias)]
    result = getattr(torch, case.result)

    integers = _arranged(torch.randint(-8, 9, (*case.lead, case.K)), case)
    normal = _arranged(torch.randn(*case.lead, case.K), case)
    call = (words, *vectors, result, case.fast)
    y = sign_matmul_triton(normal, *call)
    truth = _truth(integers, signs, *vectors)
    exact = lambda y: bool(((y.double() - truth).abs() <= _rounding(truth, result)).all())  # noqa: E731
    return Report(
        poisoned=bool(integers.new_empty(3, dtype=torch.float32).isnan().all()),
        shape=list(y.shape),
        dtype=str(y.dtype).removeprefix("torch."),
        exact=exact(sign_matmul_triton(integers, *call)),
        worst=_worst(y, case, normal, signs, *vectors),
        worst_with_wrong_sign=_worst(y, case, normal, wrong_signs, *vectors),
        exact_with_other_tiles=all(
            map(exact, _with_other_settings(case, integers, words, vectors, result)) if other_settings else ()
        ),
    )


def _truth(x: Tensor, signs: Tensor, in_scale: Any, out_scale: Any, bias: Any) -> Tensor:
    z = x.double() if in_scale is None else x.double() * in_scale
    y = z @ signs.double().T
    return y if out_scale is None else y * out_scale + bias


def _rounding(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest error of rounding to ``dtype``; 0 where it holds the truth exactly."""
    return torch.where(truth.to(dtype).double() == truth, 0.0, torch.finfo(dtype).eps / 2 * truth.abs())


def _some(every: list[dict[str, int]], case: Case) -> list[dict[str, int]]:
    """Return one of the settings to tune over, another for the next case, so that all of them are run."""
    return [every[CASES.index(case) % len(every)]] if every else []


def _with_other_settings(
    case: Case, x: Tensor, words: Tensor, vectors: list[Any], result: torch.dtype
) -> Any:
    """Yield the results of the kernels with some of the other settings to tune over."""
    from dbf_compile.kernels.sign_matmul import triton_decode, triton_dequantize, triton_prefill
    from dbf_compile.kernels.sign_matmul.regimes import DECODE_TOKENS
    from dbf_compile.signs import is_ragged

    M, N, K = math.prod(x.shape[:-1]), words.shape[0], x.shape[-1]
    if M * N * K == 0:
        return
    x, ragged = _at_the_edge(x), is_ragged(N)
    fresh = lambda: _at_the_edge(torch.full((*x.shape[:-1], N), math.nan).to(result))  # noqa: E731
    if M <= DECODE_TOKENS:
        for settings_ in _some(triton_decode.decode_blocks(M, N, K)[1:], case):
            y = fresh()
            grid = triton_decode.decode_grid(M, N, settings_)
            triton_decode.decode_kernel[grid](x, words, y, *vectors, M, N, K, RAGGED=ragged, **settings_)
            yield y
        # As compiled programs launch it: split-K, and activations that are partial sums themselves.
        partial_x = _at_the_edge(torch.stack([x - 3, torch.full_like(x, 3)]))
        settings_ = triton_decode.decode_blocks(M, N, K, split_k=3)[0] | {"BLOCK_W": 1}
        partial_y = _at_the_edge(torch.full((3, *x.shape[:-1], N), math.nan))
        grid = triton_decode.decode_grid(M, N, settings_)
        triton_decode.decode_kernel[grid](
            partial_x, words, partial_y, *vectors[:2], None, M, N, K, RAGGED=ragged, X_SPLIT_K=2, **settings_
        )
        yield (partial_y.sum(0) + (0.0 if vectors[2] is None else vectors[2].float())).to(result)
    # One operand of any dtype holds small whole numbers exactly.
    z = x.float().reshape(M, K) if vectors[0] is None else x.float().reshape(M, K) * vectors[0].float()
    operand = _at_the_edge(triton_prefill.bf16x3_split(z, torch.bfloat16, 2))
    for settings_ in _some(triton_prefill.prefill_blocks(M, N), case):
        y = fresh()
        grid = triton_prefill.prefill_grid(M, N, settings_)
        triton_prefill.prefill_kernel[grid](operand, words, y, *vectors[1:], M, N, K, 2, ragged, **settings_)
        yield y
    for settings_ in _some(triton_dequantize.dequantize_blocks(K), case):
        dense = _at_the_edge(torch.full((N, K), math.nan, dtype=torch.bfloat16))
        grid = triton_dequantize.dequantize_grid(N, K, settings_)
        triton_dequantize.dequantize_kernel[grid](words, vectors[1], dense, N, K, ragged, **settings_)
        y = z @ dense.float().T + (0.0 if vectors[2] is None else vectors[2].float())
        yield y.view(*x.shape[:-1], N).to(result)


def _worst(y: Tensor, case: Case, x: Tensor, signs: Tensor, *vectors: Any) -> float:
    """Return the largest error in units of what rounding explains."""
    in_scale, out_scale, bias = vectors
    ones = torch.ones_like(signs)
    size = _truth(x.abs(), ones, in_scale, out_scale, None if bias is None else bias.abs())
    truth = _truth(x, signs, *vectors)
    # A float32 sum of K terms, in any order, errs by at most about K u Σ|x|, u = 2⁻²⁴. A scaled 16-bit operand of tensor
    # cores is rounded once, by half the eps of its dtype, and two terms of bfloat16 keep 2⁻¹⁶; the result is rounded to
    # its own dtype.
    many = math.prod(case.lead) > 16
    operand = 0.0
    if many and case.dtype != "float32":
        operand = torch.finfo(getattr(torch, case.dtype)).eps / 2 if case.scaled else 0.0
    elif many and case.result != "float32":
        operand = torch.finfo(getattr(torch, case.result)).eps / 2
    elif many and case.fast:
        operand = 2.0**-16
    bound = ((case.K + 2) * 2.0**-24 + operand) * size
    bound += torch.finfo(getattr(torch, case.result)).eps / 2 * (truth.abs() + bound)
    error = (y.double() - truth).abs()
    # NaN compares with nothing: turn it into an error that no bound covers.
    ratios = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf)
    return ratios.max().item() if ratios.numel() else 0.0


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 70),
    K=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    result=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    fast=st.booleans(),
)
def _any_shape(M: int, N: int, K: int, dtype: str, result: str, scaled: bool, fast: bool) -> None:
    case = Case((M,), N, K, dtype, result=result, scaled=scaled, fast=fast)
    report = _report(case, other_settings=False)
    assert report.exact and report.worst <= 1, (case, report)


def _not_finite() -> list[str]:
    """Return what is infinite or undefined in the reference and not the same here, or the other way round."""
    from dbf_compile.kernels.sign_matmul.reference import sign_matmul
    from dbf_compile.kernels.sign_matmul.triton_kernel import sign_matmul_triton
    from dbf_compile.signs import interleave, pack_signs

    wrong = []
    words = interleave(pack_signs(torch.randint(0, 2, (33, 70)) * 2 - 1))
    for M, dtype, result in product((1, 3, 20), DTYPES, DTYPES):
        for name, values in {
            "infinite": {(0, 3): math.inf},
            "infinities": {(0, 3): math.inf, (0, 69): -math.inf},
            "undefined": {(0, 5): math.nan},
            "large": {(0, 3): torch.finfo(torch.float32).max / 4},
        }.items():
            x = torch.randn(M, 70)
            for place, value in values.items():
                x[place] = value
            x = x.to(getattr(torch, dtype))
            scales = (torch.ones(70), torch.ones(33), torch.zeros(33), getattr(torch, result))
            y, truth = sign_matmul_triton(x, words, *scales), sign_matmul(x, words, *scales, interleaved=True)
            if not torch.allclose(y.double(), truth.double(), rtol=0.02, atol=0.2, equal_nan=True):
                wrong.append(f"{name}, {M} tokens, {dtype} to {result}")
    return wrong


def _arranged(values: Tensor, case: Case) -> Tensor:
    """Cast to the case's dtype and lay out in memory as it asks."""
    x = values.to(getattr(torch, case.dtype))
    match case.layout:
        case "transposed":
            return _at_the_edge(x.mT).mT
        case "sliced":
            wide = _at_the_edge(x.new_full((*x.shape[:-1], case.K + 3), math.nan))
            wide[..., : case.K] = x
            return wide[..., : case.K]
        case "expanded":
            return _at_the_edge(x[:1]).expand(x.shape)
        case _:
            return _at_the_edge(x)


def _at_the_edge(values: Tensor) -> Tensor:
    """Copy to where the next byte cannot be read or written, and all before is NaN, or -1 for integers."""
    size = values.numel() * values.element_size()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, usable + mmap.PAGESIZE), dtype=torch.uint8)
    no_access = 0
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + usable), mmap.PAGESIZE, no_access)
    memory[:usable] = 0xFF
    return memory[usable - size : usable].view(values.dtype).view(values.shape).copy_(values)


def main() -> None:
    """Print what :func:`run_all` returns as JSON."""
    triton_interpreter.compute_bfloat16_as_devices_do()
    triton_interpreter.patch_the_language_once()
    triton_interpreter.add_without_checks()
    # Deterministic algorithms fill new memory with NaN: a lane the kernel forgets is seen.
    torch.use_deterministic_algorithms(True)
    reports = {}
    for case in CASES:
        print(case, file=sys.stderr, flush=True)
        torch.manual_seed(0)
        reports[str(case)] = asdict(_report(case))
    _any_shape()
    print(json.dumps({"reports": reports, "not_finite": _not_finite()}))


if __name__ == "__main__":
    main()
