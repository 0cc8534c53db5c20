"""What a process may use: cores, devices."""

from __future__ import annotations

import os

import torch


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_device(device: torch.device | str | None) -> torch.device:
    """Return ``device``; for None a GPU where there is one, of torchrun's ranks each its own, else the CPU."""
    if device is not None:
        return with_index(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def with_index(device: torch.device | str) -> torch.device:
    """Return the device that tensors on ``device`` say they are on: "cuda" is "cuda:0"."""
    return torch.empty(0, device=device).device


def default_workers(device: torch.device) -> int:
    """Return how many weights a process factors at a time: one a core, shared with torchrun's other ranks, or a GPU."""
    if device.type != "cpu":
        return 1
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
