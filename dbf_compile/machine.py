"""Cores and devices that this process may use."""

from __future__ import annotations

import os

import torch

from dbf_compile.errors import OptionError


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_device(device: torch.device | str | None) -> torch.device:
    """Return ``device``; for None this rank's GPU if CUDA is available, else the CPU."""
    if device is not None:
        return with_index(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def with_index(device: torch.device | str) -> torch.device:
    """Return the device with its index, as tensors report it: "cuda" is "cuda:0"."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that torch cannot use here
        raise OptionError(
            f"device={str(device)!r} ({str(error).splitlines()[0]})",
            "a device that torch can use here, such as 'cpu'",
            "leave device out for a GPU if there is one",
        ) from error


def default_workers(device: torch.device) -> int:
    """Return the number of weights to factor at a time: one for a GPU, else one for each core of this rank of torchrun."""
    if device.type != "cpu":
        return 1
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
