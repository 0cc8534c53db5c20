"""Machine code of the Triton kernels on each architecture, without a GPU: instructions of the main loop, registers, spills.

A row is one kernel for a matrix of 4096 x 4096: the decode kernel with its default settings, the prefill kernel with each
of its tiles, and the kernel that dequantizes signs. For NVIDIA the machine code is disassembled. "Per sign" counts all
instructions of the loop (of the kernel, if it has none) for all tokens of a tile. Nothing is run.

    python benchmarks/sass_table.py
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

from measure import write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.cuda import sass

from dbf_compile.kernels.sign_matmul.triton_decode import decode_blocks, decode_kernel
from dbf_compile.kernels.sign_matmul.triton_dequantize import dequantize_blocks, dequantize_kernel
from dbf_compile.kernels.sign_matmul.triton_prefill import prefill_blocks, prefill_kernel

COUNTED = ("LOP3", "PRMT", "SHF", "FSEL", "SEL", "LDS", "BAR")


def main() -> None:
    if reason := sass.missing_tools():
        raise SystemExit(f"cannot compile for NVIDIA: {reason}")
    import triton

    rows = [row(target, *case) for target in (*sass.TARGETS, "gfx942") for case in cases()]
    widths = {key: max(len(str(entry[key])) for entry in [*rows, {key: key}]) for key in rows[0]}
    for entry in ({key: key for key in rows[0]}, *rows):
        print("  ".join(str(entry[key]).rjust(width) for key, width in widths.items()))
    version = {"triton": triton.__version__}
    print(f"\nwritten to {write_results('sass', [{**entry, **version} for entry in rows])}")


def cases() -> list[tuple]:
    few = [
        (decode_kernel, M, dtype, decode_blocks(M, 4096, 4096, parts)[0])
        for M, dtype, parts in (
            (1, "fp32", 1),
            (1, "fp32", 4),
            (1, "bf16", 1),
            (16, "fp32", 1),
            (16, "bf16", 1),
        )
    ]
    tiles = [one for one in prefill_blocks(2048, 4096) if one["num_stages"] == 3]
    many = [(prefill_kernel, 2048, "bf16", {**settings, "OPERANDS": 1}) for settings in tiles]
    return [*few, *many, (dequantize_kernel, 2048, "bf16", dequantize_blocks(4096)[0])]


def row(target: int | str, kernel: object, M: int, dtype: str, settings: dict[str, int]) -> dict:
    compiled = sass.compile_kernel(kernel, target, dtype, M, settings)
    decode = kernel is decode_kernel
    columns = settings["BLOCK_W"] * 32 if decode else settings["BLOCK_K"]
    signs = settings["BLOCK_N"] * columns // (32 * settings["num_warps"])
    common = {
        "kernel": {decode_kernel: "decode", prefill_kernel: "prefill", dequantize_kernel: "dequantize"}[
            kernel
        ],
        "target": f"sm_{target}" if isinstance(target, int) else target,
        "tokens": "" if kernel is dequantize_kernel else M,
        "dtype": dtype,
        "tile": "x".join(str(value) for name, value in settings.items() if name.startswith("BLOCK")),
        "parts": settings.get("SPLIT_K", 1),
        "signs_per_thread": signs,
    }
    if isinstance(target, str):
        # Counts of the whole kernel, for waves of 64 threads: there is no tool here that finds its loops.
        names = re.findall(r"^\s+(v_\w+|ds_\w+|scratch_\w+)", compiled.asm["amdgcn"], re.M)
        counts = collections.Counter(names)
        total = lambda pattern: sum(n for name, n in counts.items() if re.match(pattern, name))  # noqa: E731
        return {
            **common,
            "instructions_per_sign": "",
            "additions": total(r"v_add_f32") + 2 * total(r"v_pk_add_f32"),
            "multiplications": total(r"v_(pk_)?(mul|fma|mac|fmac)_f32"),
            "matrix": total(r"v_mfma"),
            **dict.fromkeys(COUNTED, ""),
            "loads_of_16_bytes": total(r"(global|buffer)_load_dwordx4"),
            "registers": "",
            "spills": total(r"scratch_"),
        }
    code = sass.disassemble(compiled.asm["cubin"])
    loops = [loop for loop in sass.innermost_loops(code) if len(loop) > 30]  # shorter ones only wait
    loop = loops[0] if loops else sass.instructions(code)
    names = collections.Counter(one.name for one in loop)
    return {
        **common,
        "instructions_per_sign": round(len(loop) / signs, 2),
        "additions": sum(one.additions() for one in loop),
        "multiplications": sum(one.multiplies() and not one.multiplies_matrices() for one in loop),
        "matrix": sum(one.multiplies_matrices() for one in loop),
        **{name: names[name] for name in COUNTED},
        "loads_of_16_bytes": sum(one.loads_16_bytes() for one in loop),
        "registers": sass.resources(compiled.asm["cubin"]).registers,
        "spills": sum(one.spills() for one in sass.instructions(code)),
    }


if __name__ == "__main__":
    main()
