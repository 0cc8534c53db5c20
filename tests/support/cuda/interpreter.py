"""Runs the programs of :mod:`support.cuda.codegen` on a CPU, with kernels in Triton's interpreter, and prints their errors.

Triton reads ``TRITON_INTERPRET`` when it is imported; hence this file is a program, which :func:`run_all` starts. It
reads the programs from its standard input.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import json
import math
import re
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import triton
from support.cuda import libdevice, triton_interpreter
from support.cuda.codegen import (
    ARCHITECTURE_TOKENS,
    CASES,
    DEEP_TOKENS,
    LLAMA_TOKENS,
    PLAIN_TOKENS,
    SIBLING_TOKENS,
    TUNED,
    Case,
    Program,
    run_program,
)
from support.cuda.models import CACHED_TOKENS, Deep, Overwritten, Plain, Siblings, llama
from support.models.architectures import batches, random_factored_model, settings_of
from support.strategies import random_factors
from torch._inductor.runtime.triton_heuristics import GridExpr

from dbf_compile.factors import TENSOR_NAMES
from dbf_compile.linear import DoubleBinaryLinear
from dbf_compile.signs import deinterleave, unpack_signs

_ROUNDING = torch.finfo(torch.bfloat16).eps / 2


def run_all(what: str, programs: dict[str, Program]) -> dict[str, float]:
    """Run all programs of "layers" or "architectures"; return the largest error of each in units of what rounding explains."""
    text = json.dumps([what, {name: asdict(program) for name, program in programs.items()}])
    errors: dict[str, float] = run_program(Path(__file__), text, TRITON_INTERPRET="1")
    return errors


def main() -> None:
    """Print the errors of the programs on standard input as JSON."""
    triton_interpreter.compute_bfloat16_as_devices_do()
    triton_interpreter.reduce_halves()
    triton_interpreter.patch_the_language_once()
    triton_interpreter.add_without_checks()
    what, loaded = json.load(sys.stdin)
    programs = {name: Program(**fields) for name, fields in loaded.items()}
    print(json.dumps({"layers": _run_layers, "architectures": _run_architectures}[what](programs)))


def _run_layers(programs: dict[str, Program]) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        worst = {str(case): _worst(case, programs[str(case)], Path(folder, str(case))) for case in CASES}
        for case in TUNED:
            name = f"tuned {case}"
            worst[name] = _worst(case, programs[name], Path(folder, name))
        worst["tuned deep of 1"] = _worst_of_deep(1, programs["tuned deep of 1"], Path(folder, "tuned deep"))
        for M in SIBLING_TOKENS:
            name = f"siblings of {M}"
            worst[name] = _worst_of_siblings(M, programs[name], Path(folder, name))
        worst["apart"] = _worst_of_siblings(1, programs["apart"], Path(folder, "apart"))
        for M in DEEP_TOKENS:
            name = f"deep of {M}"
            worst[name] = _worst_of_deep(M, programs[name], Path(folder, name))
        worst["plain"] = _worst_of_plain(programs["plain"], Path(folder, "plain"))
        worst["overwritten"] = _worst_of_overwritten(programs["overwritten"], Path(folder, "overwritten"))
        if find_spec("transformers"):
            for M in LLAMA_TOKENS:
                name = f"llama of {M}"
                worst[name] = _worst_of_llama(M, programs[name], Path(folder, name))
    return worst


def _run_architectures(programs: dict[str, Program]) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        return {
            name: _worst_of_architecture(name, M, programs[name], Path(folder, name))
            for name, M in ARCHITECTURE_TOKENS.items()
        }


def _worst(case: Case, program: Program, folder: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    factors = random_factors(case.K, case.R, case.N)
    layer = DoubleBinaryLinear(factors)
    x = torch.randn(case.M, case.K, generator=generator).to(dtype)
    bias = torch.randn(case.N, generator=generator).to(dtype)
    inputs = [x, *_tensors(layer), bias]
    (y,) = _load(program, folder)(None, [case.M, *inputs] if case.dynamic else inputs)
    assert (y.shape, y.dtype) == ((case.M, case.N), dtype)

    dense = factors.dense(torch.float64)
    truth = x.double() @ dense.T + bias.double()
    # Three float32 sums of K and three of R terms; for tensor cores, the operands of both products are rounded to 16 bits,
    # by half an eps each; and one rounding of the result.
    size = (x.double().abs() @ factors_of_ones(factors).T).amax() + bias.double().abs().amax()
    wide = torch.promote_types(dtype, torch.float32)
    narrow = torch.finfo(dtype).eps if case.M > 16 and dtype != wide else 0.0
    sums = 3 * (case.K + case.R) * torch.finfo(wide).eps
    error, result = (y.double() - truth).abs(), torch.finfo(dtype).eps / 2
    each = (error / ((sums + narrow) * size + result * truth.abs())).nan_to_num(nan=math.inf).max().item()
    # In the norm, errors cancel, because terms have random signs.
    overall = error.norm() / ((sums / 16 + narrow + result) * truth.norm())
    return max(each, overall.nan_to_num(nan=math.inf).item())


def _worst_of_siblings(M: int, program: Program, folder: Path) -> float:
    model = Siblings()
    x = torch.randn(M, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    first, *others = model.layers
    inputs = [x, *_tensors(first)]
    for layer in others:
        inputs += [layer.signs_out, layer.scale_out]
    shapes = [eval(shape) for shape in re.findall(r"assert_size_stride\(arg\d+_1, (\(.*?\)), ", program.call)]
    assert sorted(shapes) == sorted(tuple(tensor.shape) for tensor in inputs)
    y = torch.cat(_load(program, folder)(None, list(inputs)), dim=-1)
    truth = torch.cat([x.double() @ layer.factors.dense(torch.float64).T for layer in model.layers], dim=-1)
    # Divide by the scales of the rows, so that all rows count alike.
    scales = torch.cat([layer.scale_out.double() for layer in model.layers])
    error = ((y.double() - truth) / scales).norm() / (truth / scales).norm()
    # One rounding of the result; for tensor cores also one of the operands of each stage.
    return (error / _ROUNDING / (1 if M <= 16 else 3)).nan_to_num(nan=math.inf).item()


def _worst_of_deep(M: int, program: Program, folder: Path) -> float:
    model = Deep(True)
    x = torch.randn(M, 2100, generator=torch.Generator().manual_seed(0)).bfloat16()
    first, second = model.first.factors, model.second.factors
    inputs = [x, *_tensors(model.first), *_tensors(model.second)]
    results = _load(program, folder)(None, list(inputs))
    z = torch.relu(x.double() @ first.dense(torch.float64).T)
    truths = (z @ second.dense(torch.float64).T, z)
    errors = [(y.double() - truth).norm() / truth.norm() for y, truth in zip(results, truths, strict=True)]
    # Rounded after each layer.
    return max((error / _ROUNDING / 2).nan_to_num(nan=math.inf).item() for error in errors)


def _worst_of_plain(program: Program, folder: Path) -> float:
    model = Plain()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PLAIN_TOKENS, model.SIZE[1], generator=generator).bfloat16()
    results = _load(program, folder)(None, [model.scale, x, model.interleaved, model.in_rows])
    assert [y.dtype for y in results] == [*model.DTYPES, torch.float32, torch.float32]
    truth = x.double() @ unpack_signs(model.in_rows, model.SIZE[1], torch.float64).T
    truths = [*(truth * model.scale for _ in model.DTYPES), truth, truth]
    # Float32 sums over the columns, scales rounded to the dtype of x, and the result rounded to its own.
    sums = model.SIZE[1] * torch.finfo(torch.float32).eps / 16
    roundings = [_ROUNDING + torch.finfo(dtype).eps / 2 for dtype in model.DTYPES] + [0.0, 0.0]
    errors = [
        (y.double() - exact).norm() / exact.norm() / (sums + rounding)
        for y, exact, rounding in zip(results, truths, roundings, strict=True)
    ]
    return max(error.nan_to_num(nan=math.inf).item() for error in errors)


def _worst_of_overwritten(program: Program, folder: Path) -> float:
    model = Overwritten()
    x = torch.randn(1, 2100, generator=torch.Generator().manual_seed(0))
    (y,) = _load(program, folder)(None, [model.signs0, x, model.zero, model.signs1])
    signs = [
        unpack_signs(deinterleave(words), size[1], torch.float64)
        for words, size in zip((model.signs0, model.signs1), model.SIZES, strict=True)
    ]
    h = x.double() @ signs[0].T
    truth = torch.where(h > 3, 0.0, h) @ signs[1].T
    # Two float32 sums of about a thousand terms.
    return ((y.double() - truth).norm() / truth.norm() / 1e-5).nan_to_num(nan=math.inf).item()


def _worst_of_llama(M: int, program: Program, folder: Path) -> float:
    """Compare the logits and the cache with those of the eager model."""
    tokens = torch.randint(0, 320, (1, 4 + M), generator=torch.Generator().manual_seed(0))
    model = llama(factored=True).bfloat16()
    exact, eager = _read(copy.deepcopy(model).float(), tokens), _read(model, tokens)
    recorder = _Recorder()
    _read(model, tokens, recorder)
    (logits,) = (y for y in _load(program, folder)(None, list(recorder.inputs)) if y.shape == eager[0].shape)
    results = [logits, *(tensor for tensor in recorder.inputs if tensor.dim() == 4)]
    return _worst_ratio(M, results, eager, exact)


def _worst_of_architecture(name: str, M: int, program: Program, folder: Path) -> float:
    """Compare logits with those of the eager model."""
    model = random_factored_model(name, blocks=1).bfloat16()
    exact_model = copy.deepcopy(model).float()
    batch = next(batches(name, M))
    narrow = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    wide = {key: value.float() if value.is_floating_point() else value for key, value in narrow.items()}
    settings, recorder = settings_of(name), _Recorder()
    torch.compiler.reset()
    with torch.no_grad():
        exact, eager = exact_model(**wide, **settings).logits, model(**narrow, **settings).logits
        torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)(**narrow, **settings)
    (logits,) = (y for y in _load(program, folder)(None, list(recorder.inputs)) if y.shape == eager.shape)
    return _worst_ratio(M, [logits], [eager], [exact])


class _Recorder:
    """A backend that runs graphs as they are and records the inputs that Dynamo passes, in order."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def __call__(self, graph: Any, inputs: list[torch.Tensor]) -> Any:
        self.inputs += [tensor.clone() for tensor in inputs]
        return graph.forward


def _worst_ratio(
    M: int, results: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor]
) -> float:
    """Return the error of a model's results in units of the error of its eager bfloat16 form."""
    # There are as many roundings as in the eager model, and a fifth more error by chance. Tensor cores also get rounded
    # operands in each of the two stages: three roundings for one of the eager model.
    allowed = 1.2 if M <= 16 else math.sqrt(3)
    ratios = [
        (y.double() - truth).norm() / (expected - truth).norm() / allowed
        for y, expected, truth in zip(results, eager, exact, strict=True)
    ]
    return torch.stack(ratios).nan_to_num(nan=math.inf).max().item()


def _read(model: Any, tokens: torch.Tensor, backend: Any = None) -> list[torch.Tensor]:
    """Return the logits of all but the first four tokens, which only fill the cache, and the cache."""
    from transformers import StaticCache

    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=CACHED_TOKENS)
    step = torch.compile(model, backend=backend, fullgraph=True, dynamic=False) if backend else model
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        model(tokens[:, :4], past_key_values=cache, position_ids=positions[:, :4])
        logits = step(tokens[:, 4:], past_key_values=cache, position_ids=positions[:, 4:]).logits
    return [logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))]


def _tensors(layer: DoubleBinaryLinear) -> list[torch.Tensor]:
    """Return the factors of a layer in the order in which its ``forward`` reads them."""
    return [getattr(layer, name).detach() for name in TENSOR_NAMES]


def factors_of_ones(factors: Any) -> torch.Tensor:
    """Return the largest values that ``dense`` can have, if all signs agree: the size of the terms of its sums."""
    inner, outer = factors.scale_in.double().abs(), factors.scale_out.double().abs()
    return outer[:, None] * factors.scale_mid.double().abs().sum() * inner


def _load(program: Program, folder: Path) -> Any:
    """Return the program's launching function, with interpreted kernels and CPU memory full of NaN."""
    folder.mkdir()
    namespace: dict[str, Any] = {
        name: SimpleNamespace(run=_launcher(name, text, folder)) for name, text in program.kernels.items()
    }
    nothing = lambda *_: None  # noqa: E731
    namespace.update(
        torch=SimpleNamespace(
            cuda=SimpleNamespace(_DeviceGuard=lambda _: contextlib.nullcontext(), set_device=nothing),
            ops=torch.ops,
            **{name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
        ),
        extern_kernels=SimpleNamespace(
            mm=_matmul, mm_dtype=_matmul, bmm=_matmul, addmm=_addmm, convolution=_convolution
        ),
        assert_size_stride=torch._C._dynamo.guards.assert_size_stride,
        assert_alignment=nothing,
        copy_if_misaligned=lambda tensor: tensor,
        empty_strided_cuda=_poisoned,
        get_raw_stream=nothing,
        reinterpret_tensor=lambda tensor, size, stride, offset=0: tensor.as_strided(size, stride, offset),
    )
    exec(program.call, namespace)
    return namespace["call"]


def _poisoned(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # An index that was not written must still be valid.
    return torch.empty_strided(size, stride, dtype=dtype).fill_(math.nan if dtype.is_floating_point else 1)


def _matmul(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, out_dtype: torch.dtype | None = None
) -> None:
    assert out_dtype in (None, out.dtype)
    out.copy_(a.float() @ b.float())  # float32 sums, as on a device


def _addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float, out: torch.Tensor
) -> None:
    out.copy_(alpha * (a.float() @ b.float()) + beta * bias.float())


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: None, **settings: Any) -> torch.Tensor:
    return torch.ops.aten.convolution(x.float(), weight.float(), bias, **settings).to(x.dtype).contiguous()


def _launcher(name: str, source: str, folder: Path) -> Any:
    """Return ``run`` of a generated kernel; it takes the arguments of the kernel, then the grid of a template."""
    module = ast.parse(source)
    kernel = next(
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(item, ast.Call) for item in node.decorator_list)
    )
    (meta,) = (
        ast.literal_eval(keyword.value)
        for item in kernel.decorator_list
        if isinstance(item, ast.Call)
        for keyword in item.keywords
        if keyword.arg == "inductor_meta"
    )
    # Drop the decorators that choose a launch on a device.
    kernel.decorator_list = [item for item in kernel.decorator_list if isinstance(item, ast.Attribute)]
    module.body = [
        node
        for node in module.body
        if not (
            (isinstance(node, ast.ImportFrom) and "triton_helpers" not in ast.unparse(node))
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        )
    ]
    file = folder / f"{len(list(folder.iterdir()))}.py"  # the kernel's name may be too long for a file
    file.write_text(ast.unparse(module))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.libdevice = libdevice
    interpreted = getattr(loaded, kernel.name)
    if name.startswith("triton_tem"):
        return lambda *args, stream: interpreted[args[-3:]](*args[:-3])
    names = [item.arg for item in kernel.args.args]

    def run(*args: Any, stream: None) -> None:
        sizes = dict(zip(names, args, strict=False))
        blocks = {key: value for key, value in _blocks(name, sizes).items() if key in names}
        interpreted[GridExpr.from_meta(meta, blocks).eval_slow(sizes)](*args, **blocks)

    return run


def _blocks(name: str, sizes: dict[str, Any]) -> dict[str, int]:
    """Return block sizes of a kernel of Inductor's own: powers of two up to 4096, for which it may leave out masks."""
    if name.startswith(("triton_per", "triton_red")):  # sums over rows
        return {"XBLOCK": math.gcd(sizes["xnumel"], 64), "R0_BLOCK": 64}
    if "ynumel" in sizes:
        return {"XBLOCK": 64, "YBLOCK": 16, "ZBLOCK": 16}
    # Several programs, but not many: each is slow.
    return {"XBLOCK": min(max(64, triton.next_power_of_2(sizes.get("xnumel", 0) // 4)), 4096)}


if __name__ == "__main__":
    main()
