"""Runs the programs of :mod:`support.cuda_codegen` on a CPU, kernels in Triton's interpreter, and prints their errors.

Triton reads ``TRITON_INTERPRET`` when it is imported; hence this file is a program, which :func:`run_all` starts. It
reads the programs from its standard input.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from support.cuda_codegen import CASES, Case, Program, run_program
from support.strategies import random_factors

_BLOCK = 64  # elements for each program of a pointwise kernel


def run_all(programs: dict[str, Program]) -> dict[str, float]:
    """Run all programs; return by case the largest error in units of what rounding explains."""
    given = json.dumps({name: asdict(program) for name, program in programs.items()})
    found: dict[str, float] = run_program(Path(__file__), given, TRITON_INTERPRET="1")
    return found


def main() -> None:
    """Print the errors of the programs on standard input as JSON."""
    programs = {name: Program(**fields) for name, fields in json.load(sys.stdin).items()}
    with TemporaryDirectory() as folder:
        worst = {str(case): _worst(case, programs[str(case)], Path(folder, str(case))) for case in CASES}
    print(json.dumps(worst))


def _worst(case: Case, program: Program, folder: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    factors = random_factors(case.K, case.R, case.N)
    x = torch.randn(case.M, case.K, generator=generator).to(dtype)
    bias = torch.randn(case.N, generator=generator).to(dtype)
    inputs = [x, *factors.tensors().values(), bias]
    (y,) = _load(program, folder)(None, [case.M, *inputs] if case.dynamic else inputs)
    assert (y.shape, y.dtype) == ((case.M, case.N), dtype)

    dense = factors.dense(torch.float64)
    truth = x.double() @ dense.T + bias.double()
    # Two float32 sums of K and R terms, and one rounding of the result.
    size = (x.double().abs() @ factors_of_ones(factors).T).amax() + bias.double().abs().amax()
    wide = torch.promote_types(dtype, torch.float32)
    bound = (case.K + case.R) * torch.finfo(wide).eps * size + torch.finfo(dtype).eps * truth.abs()
    return ((y.double() - truth).abs() / bound).nan_to_num(nan=math.inf).max().item()


def factors_of_ones(factors: Any) -> torch.Tensor:
    """Return what ``dense`` is at most, where all signs agree: the size of the terms that are summed."""
    inner, outer = factors.scale_in.double().abs(), factors.scale_out.double().abs()
    return outer[:, None] * factors.scale_mid.double().abs().sum() * inner


def _load(program: Program, folder: Path) -> Any:
    """Return the launching function, with interpreted kernels and CPU memory full of NaN in place of the device."""
    folder.mkdir()
    namespace: dict[str, Any] = {
        name: SimpleNamespace(run=_launcher(name, text, folder)) for name, text in program.kernels.items()
    }
    empty = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype).fill_(math.nan)  # noqa: E731
    nothing = lambda *_: None  # noqa: E731
    namespace.update(
        torch=SimpleNamespace(
            cuda=SimpleNamespace(_DeviceGuard=lambda _: contextlib.nullcontext(), set_device=nothing),
            ops=torch.ops,
            **{str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64)},
            bfloat16=torch.bfloat16,
            float16=torch.float16,
        ),
        assert_size_stride=nothing,
        assert_alignment=nothing,
        copy_if_misaligned=lambda tensor: tensor,
        empty_strided_cuda=empty,
        get_raw_stream=nothing,
        reinterpret_tensor=lambda tensor, size, stride, offset=0: tensor.as_strided(size, stride, offset),
    )
    exec(program.call, namespace)
    return namespace["call"]


def _launcher(name: str, source: str, folder: Path) -> Any:
    """Return ``run`` of a generated kernel: its arguments are the kernel's, then the grid if it is one of ours."""
    module = ast.parse(source)
    (kernel,) = (node for node in module.body if isinstance(node, ast.FunctionDef))
    meta = next(
        keyword.value
        for decorator in kernel.decorator_list
        if isinstance(decorator, ast.Call)
        for keyword in decorator.keywords
        if keyword.arg == "triton_meta"
    )
    assert isinstance(meta, ast.Dict)
    constants = next(
        ast.literal_eval(value)
        for key, value in zip(meta.keys, meta.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "constants"
    )
    # Left out: what chooses the launch on a device.
    kernel.decorator_list = [item for item in kernel.decorator_list if isinstance(item, ast.Attribute)]
    module.body = [
        node
        for node in module.body
        if not (
            isinstance(node, ast.ImportFrom)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        )
    ]
    file = folder / f"{name}.py"
    file.write_text(ast.unparse(module))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    interpreted = getattr(loaded, kernel.name)
    if name == kernel.name:  # Inductor's own, one-dimensional
        return lambda *given, stream: interpreted[(-(-given[-1] // _BLOCK),)](*given, XBLOCK=_BLOCK)
    blocks = {key: value for key, value in constants.items() if key.startswith("BLOCK")}
    return lambda *given, stream: interpreted[given[-3:]](*given[:-3], **blocks)


if __name__ == "__main__":
    main()
