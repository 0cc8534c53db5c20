"""What this machine can run, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from dbf_compile.files import cache_folder
from dbf_compile.kernels import cpp_build
from dbf_compile.kernels.sign_matmul import cpu_kernel

# Package to the extra that installs it, and what it brings.
EXTRAS = {
    "transformers": ("hf", "compressing and loading models of transformers, generation, evaluation"),
    "accelerate": ("hf", "device_map, and models larger than a device"),
    "gguf": ("gguf", "models in GGUF files"),
    "lm_eval": ("eval", "dbf-compile eval --tasks"),
    "peft": ("lora", "LoRA adapters on factored layers"),
    "ray": ("ray", "workers on a cluster"),
    "datasets": ("data", "text from datasets of the Hub"),
}


@dataclass(frozen=True)
class Finding:
    """The state of one thing that the package uses.

    Attributes:
        name: of the thing.
        state: "good", "slow" (it works, but not as fast as it could) or "missing".
        detail: its version or place, or what to do.
        needed: whether nothing works without it.
    """

    name: str
    state: str
    detail: str
    needed: bool = False


def examine() -> list[Finding]:
    """Examine the processor, the compiler, GPUs, folders and packages of this machine."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    yield Finding("python", "good", platform.python_version())
    yield Finding("torch", "good", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Finding("processor", "good", f"{platform.machine()}, {os.cpu_count()} cores")
    compiler = cpp_build.compiler()
    if compiler is None:
        yield Finding("compiler", "slow", "none: install g++ or clang++ for the fast CPU kernels")
    else:
        yield Finding("compiler", "good", compiler)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built = cpu_kernel.available()
        isa = os.environ.get("DBF_CPU_ISA", "the best of this processor")
        detail = f"built; instruction set: {isa}; torch uses {torch.backends.cpu.get_cpu_capability()}"
        if not built:
            detail = str(caught[0].message) if caught else "they cannot be built"
        yield Finding("CPU kernels", "good" if built else "slow", detail)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            yield Finding(f"GPU {index}", "good", f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")
        yield _package("triton", "for the GPU kernels: pip install triton", needed=True)
    else:
        yield Finding("GPU", "good", "none that torch can see; the CPU kernels are used")
    yield _writable()
    for name, (extra, use) in EXTRAS.items():
        yield _package(name, f"for {use}: pip install 'dbf-compile[{extra}]'")


def _package(name: str, advice: str, needed: bool = False) -> Finding:
    try:
        return Finding(name, "good", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", advice, needed)


def _writable() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "cache folder", "missing", f"{error}: set DBF_CACHE_DIR to a folder of yours", needed=True
        )
    return Finding("cache folder", "good", f"{folder}, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free")
