"""A pretended CUDA device, an H100 by its answers, for programs that are compiled but not run.

Patches last until the process ends; use it in a process of its own.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from support.device.shared_library import build

CAPABILITY = (9, 0)


PROPERTIES = SimpleNamespace(
    name="pretended",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    L2_cache_size=50 << 20,
    is_integrated=False,
)


def pretend_cuda() -> None:
    """Answer for an H100 wherever torch or Triton would ask the driver, until this process ends."""
    import torch._inductor.runtime.triton_helpers
    import torch._inductor.utils
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._subclasses import fake_tensor
    from triton.runtime import driver

    _pretend_interface()
    _pretend_module()
    with TemporaryDirectory() as folder:
        torch.ops.load_library(build(Path(__file__).with_name("guard.cpp"), Path(folder)))
    torch.version.cuda = torch.version.cuda or "13.0"
    _answer(fake_tensor, init_gpu_context=None)
    _answer(torch._inductor.runtime.triton_helpers, set_driver_to_gpu=None)
    _answer(torch._inductor.utils, is_big_gpu=True)
    # These register patterns with tensors on the device.
    _answer(misc_patterns, _misc_patterns_init=None)
    _answer(fuse_attention, _sfdp_init=None)
    _answer(pad_mm, _pad_mm_init=None)
    driver.set_active(_Driver())


def _answer(owner: Any, **answers: Any) -> None:
    """Replace functions of ``owner`` by ones that return the given values."""
    for name, value in answers.items():
        function = lambda *_, _value=value, **__: _value  # noqa: E731
        setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)


def _pretend_interface() -> None:
    """Replace what Dynamo and Inductor ask about devices."""
    from torch._dynamo import device_interface

    device_interface.get_interface_for_device(
        "cuda"
    )  # registers the true interfaces, which are then replaced
    worker = type("Worker", (), {})
    interface = type("PretendedInterface", (device_interface.CudaInterface,), {"Worker": worker})
    for owner in (worker, interface):
        _answer(owner, set_device=None, current_device=0, get_device_properties=PROPERTIES)
    _answer(
        interface,
        device_count=1,
        synchronize=None,
        exchange_device=0,
        maybe_exchange_device=0,
        is_bf16_supported=True,
        is_available=True,
        get_compute_capability=10 * CAPABILITY[0] + CAPABILITY[1],
        is_triton_capable=True,
        raise_if_triton_unavailable=None,
    )
    device_interface.device_interfaces.update({"cuda": interface, "cuda:0": interface})


def _pretend_module() -> None:
    """Replace functions of torch.cuda and its like."""
    _answer(
        torch.cuda,
        is_available=True,
        is_initialized=True,
        current_device=0,
        device_count=1,
        get_device_properties=PROPERTIES,
        get_device_capability=CAPABILITY,
        get_device_name="pretended",
        set_device=None,
        synchronize=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
        is_bf16_supported=True,
        _lazy_init=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
    )
    _answer(torch.cuda.random, current_device=0)
    _answer(torch._C, _cuda_getCurrentRawStream=0)
    _answer(torch.accelerator, is_available=False, current_device_index=0)


class _Driver:
    """The questions that Triton asks its driver while it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True
