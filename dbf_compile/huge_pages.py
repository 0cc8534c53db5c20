"""Weights in huge pages: memory that is read faster, since its addresses are translated a few hundred times less often.

A token reads all weights once. Reading a packed sign matrix of 243 MB with two threads made 28 GB/s in pages of 2 MiB and 20 in
pages of 4 KiB (a virtual machine on a Xeon, by hand). Linux gives such pages to memory that asks for them; elsewhere, and where
there are none left, nothing changes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

_PAGE = 2**21  # bytes of a huge page
_ALIGNMENT = 64  # bytes of a cache line, and of a vector register
_PLAIN = (Tensor, nn.Parameter)  # a subclass may hold its numbers elsewhere


def in_huge_pages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with equal content in huge pages; those that are one tensor in memory stay one.

    Args:
        tensors: by any names. Those that are on another device, not contiguous, of a subclass, or that overlap another in part
            are returned as they are.
    """
    return {**tensors, **dict(_copies(tensors))}


def move_to_huge_pages(model: nn.Module) -> None:
    """Move the parameters and buffers of a model to huge pages, in place; what :func:`in_huge_pages` leaves stays."""
    own = dict((*model.named_parameters(), *model.named_buffers()))
    for name, copy in _copies(own):
        own[name].data = copy  # frees what it was before the next one is copied


def _copies(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of those that can be moved, by name; one is made when it is asked for."""
    places = _places(tensors.values())
    memory = _allocate(sum(_padded(size) for _, size in places))
    if memory is None:
        return
    begins, position = {}, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    for place in places:
        begins[place] = position
        position += _padded(place[1])
    moved: dict[tuple[int, int], Tensor] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.nbytes) if _is_movable(tensor) else (0, 0)
        if place not in begins:
            continue
        if place not in moved:
            # A storage of its own: what saves or counts storages sees what it saw before.
            moved[place] = torch.frombuffer(memory, dtype=torch.uint8, count=place[1], offset=begins[place])
            moved[place].copy_(tensor.detach().flatten().view(torch.uint8))
        yield name, moved[place].view(tensor.dtype).view(tensor.shape)


def _is_movable(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.nbytes > 0
    )


def _places(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return addresses and sizes of tensors that can be moved, each once.

    Those that overlap another in part, or share memory with one that cannot be moved, are left out.
    """
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for tensor in tensors:
        parts[_is_movable(tensor)].append(tensor)
    stay = {_storage_of(tensor) for tensor in parts[False]}
    movable = [tensor for tensor in parts[True] if _storage_of(tensor) not in stay]
    found = sorted({(tensor.data_ptr(), tensor.nbytes) for tensor in movable})
    alone = []
    end = 0  # of all before
    for index, (begin, size) in enumerate(found):
        following = found[index + 1][0] if index + 1 < len(found) else begin + size
        if begin >= end and following >= begin + size:
            alone.append((begin, size))
        end = max(end, begin + size)
    return alone


def _storage_of(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common; 0 for those that have no memory of their own."""
    is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    try:
        return tensor.untyped_storage().data_ptr() if is_plain else 0
    except (RuntimeError, NotImplementedError):  # of a subclass
        return 0


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _allocate(size: int) -> mmap.mmap | None:
    """Return private memory that asks for huge pages, with one more for alignment; None where there is none, or no gain."""
    if size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a limit of this process; what is there already can be used as it is
        return None
    with suppress(OSError):  # of a system that is built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
