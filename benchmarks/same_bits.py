"""Hashes of the results of the factorizer and of ``compress``: versions that print equal lines produce equal bits.

    python benchmarks/same_bits.py            six matrices at four sizes, and stories260K where ../shared is present

The hashes depend on the processor and on the torch build, so they are compared between two runs on one machine.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import dbf_compile
from dbf_compile.factors import mid_features_for

SHAPES = ((96, 96), (160, 160), (256, 96), (300, 70), (96, 256), (70, 300))  # square, tall, wide: [N, K]
BITS = (0.8, 1.0, 2.0, 4.0)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def main() -> None:
    for index, (rows, columns) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(rows, columns, generator=generator)
        importance = dbf_compile.Importance(
            torch.rand(columns, generator=generator), torch.rand(rows, generator=generator)
        )
        for bits in BITS:
            mid_features = mid_features_for(bits, columns, rows)
            config = dbf_compile.FactorizerConfig(iterations=120)
            factors = dbf_compile.factorize(weight, mid_features, importance, config)
            print(f"{rows} x {columns}, {bits} bits: {_hash(factors.tensors())}", flush=True)
    model = SHARED / "models" / "stories260K"
    if not model.is_dir():
        print(f"no {model}: stories260K is left out")
        return
    for mode in ("independent", "block"):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "compressed"
            dbf_compile.compress(
                model,
                output,
                bits=2.0,
                data=SHARED / "text" / "tinystories-valid-a.txt",
                mode=mode,
                preset="fast",
                windows=8,
                length=128,
                own_text=0,
                holdout=2,
                tune=1,
                refine=1,
                distill=1,
                progress=False,
            )
            print(f"stories260K, {mode}: {_hash(load_file(output / 'model.safetensors'))}", flush=True)


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


if __name__ == "__main__":
    main()
