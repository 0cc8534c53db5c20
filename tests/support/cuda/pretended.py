"""A CUDA device that is not there, for what compiles without running: an H100, by its answers.

All that is patched stays patched; hence this is for processes of their own.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from support.device.shared_library import build

CAPABILITY = (9, 0)


def pretend_cuda() -> None:
    """Answer for an H100 wherever torch or Triton would ask the driver, until this process ends."""
    import torch._inductor.runtime.triton_helpers
    import torch._inductor.utils
    from torch._dynamo import device_interface
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._subclasses import fake_tensor
    from triton.runtime import driver

    major, minor = CAPABILITY
    properties = SimpleNamespace(
        name="pretended",
        major=major,
        minor=minor,
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

    def answer(owner: Any, **answers: Any) -> None:
        for name, value in answers.items():
            setattr(owner, name, value if callable(value) else lambda *_, _value=value, **__: _value)

    device_interface.get_interface_for_device("cuda")  # registers the true ones, which are then replaced
    worker = type("Worker", (), {})
    interface = type("PretendedInterface", (device_interface.CudaInterface,), {"Worker": worker})
    names = ("set_device", "current_device", "get_device_properties")
    known = dict(zip(names, (None, 0, properties), strict=True))
    for owner, answers in (
        (worker, known),
        (
            interface,
            {
                **known,
                "device_count": 1,
                "synchronize": None,
                "exchange_device": 0,
                "maybe_exchange_device": 0,
                "is_bf16_supported": True,
                "is_available": True,
                "get_compute_capability": 10 * major + minor,
                "is_triton_capable": True,
                "raise_if_triton_unavailable": None,
            },
        ),
    ):
        for name, value in answers.items():
            setattr(owner, name, staticmethod(lambda *_, _value=value, **__: _value))
    device_interface.device_interfaces.update({"cuda": interface, "cuda:0": interface})

    answer(
        torch.cuda,
        is_available=True,
        is_initialized=True,
        current_device=0,
        device_count=1,
        get_device_properties=properties,
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
    answer(torch.cuda.random, current_device=0)
    answer(torch._C, _cuda_getCurrentRawStream=0)
    with TemporaryDirectory() as folder:
        torch.ops.load_library(build(Path(__file__).with_name("guard.cpp"), Path(folder)))
    answer(torch.accelerator, is_available=False, current_device_index=0)
    torch.version.cuda = torch.version.cuda or "13.0"
    answer(fake_tensor, init_gpu_context=None)
    answer(torch._inductor.runtime.triton_helpers, set_driver_to_gpu=None)
    answer(torch._inductor.utils, is_big_gpu=True)
    # These register patterns with tensors on the device.
    answer(misc_patterns, _misc_patterns_init=None)
    answer(fuse_attention, _sfdp_init=None)
    answer(pad_mm, _pad_mm_init=None)
    driver.set_active(_Driver())


class _Driver:
    """What Triton asks its driver while it compiles."""

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
