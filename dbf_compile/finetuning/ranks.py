"""Data parallel training: every process of torchrun or Accelerate takes its share of a step, gradients are summed.

Both start processes with the variables RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; nothing else of them is needed here. A process
group that exists already is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dbf_compile.machine import has_peers

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Args:
        rank: its number.
        size: how many there are.
        device: where each of them computes, a GPU of its own or the CPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    def share(self, windows: Tensor) -> Tensor:
        """Return the windows of a step that this process takes: every ``size``-th; none where there are too few."""
        return windows[self.rank :: self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place; all of them get the same bits."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast(self, value: T | None) -> T:
        """Return what the first process has, in all of them."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=self.device)  # else all would use the first GPU
        return cast(T, values[0])

    def wait(self) -> None:
        """Wait for all others."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Yield this process among those that were started with it; alone it is the only one."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if not (has_peers() and dist.is_available()):
        yield Ranks()
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
