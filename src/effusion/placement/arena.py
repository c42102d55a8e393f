"""The ring: one piece of memory of fixed size on the compute device that streamed weights pass through."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.memory import in_huge_pages

# Bytes. On the CPU weights keep their address modulo this: kernels may round differently with another one (modulo 64),
# and whole sectors of files can be read into place past the system's cache.
ALIGN = 512
Pages = TypeVar("Pages", bound=mmap.mmap)


@dataclass
class Room:
    """Bytes ``[start, start + nbytes)`` of an arena; ``events`` end what was computed from them before."""

    start: int
    nbytes: int
    events: list[Any] = field(default_factory=list)


class Arena:
    """``capacity`` bytes on ``device``, handed out first-fit and given back in any order."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self.buffer = allocate(capacity, device)
        self._free = [Room(0, capacity)]

    @property
    def free(self) -> int:
        return sum(room.nbytes for room in self._free)

    @property
    def idle(self) -> bool:
        return self.free == self.capacity

    def take(self, nbytes: int) -> Room | None:
        """Room for ``nbytes``, or ``None`` if there is no piece of that size."""
        nbytes = max(-(-nbytes // 512) * 512, 512)
        for index, room in enumerate(self._free):
            if room.nbytes >= nbytes:
                taken = Room(room.start, nbytes, list(room.events))
                room.start, room.nbytes = room.start + nbytes, room.nbytes - nbytes
                if not room.nbytes:
                    del self._free[index]
                return taken
        return None

    def give(self, room: Room) -> None:
        """Take ``room`` back; neighbours that are free become one."""
        room.events = [e for e in room.events if not e.query()]
        self._free.append(room)
        self._free.sort(key=lambda r: r.start)
        merged: list[Room] = []
        for r in self._free:
            if merged and merged[-1].start + merged[-1].nbytes == r.start:
                merged[-1].nbytes += r.nbytes
                merged[-1].events = [e for e in merged[-1].events if not e.query()] + r.events
            else:
                merged.append(r)
        self._free = merged

    def bytes(self, room: Room) -> Tensor:
        return self.buffer[room.start : room.start + room.nbytes]

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in this arena."""
        return tensor.device == self.device and tensor.untyped_storage().data_ptr() == self.buffer.data_ptr()

    def apart(self, tensor: Tensor) -> Tensor:
        """``tensor``, copied if it lies in this arena."""
        return tensor.clone() if self.holds(tensor) else tensor


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """``nbytes`` of plain bytes on ``device``, usable in and out of inference mode.

    On the CPU they are whole pages from the system: pages that were not written to cost nothing,
    and all of them go back when the tensor is gone. Huge ones, if there are, take a disk half the time to fill.
    """
    with torch.inference_mode(False):
        if device.type != "cpu" or nbytes == 0:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        return in_huge_pages(host_pages(nbytes)[1])


def host_pages(nbytes: int, kind: type[Pages] = mmap.mmap) -> tuple[Pages, Tensor]:  # type: ignore[assignment]
    """Pages from the system, and a tensor over them that keeps them alive.

    Raises:
        MemoryError: it has none left.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        pages = kind(-1, nbytes, **private)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"the system has no {nbytes} bytes of memory left") from error
    return pages, torch.frombuffer(pages, dtype=torch.uint8)


def layout(tensors: list[Tensor], on_cpu: bool) -> tuple[list[int], int]:
    """Where each tensor goes in a piece of memory that holds all, and how large that is.

    On the CPU an address keeps its remainder by :data:`ALIGN`; slices that follow one another in a
    file then also do so here, and are read in one go.
    """
    at, offsets = 0, []
    for tensor in tensors:
        wanted = tensor.data_ptr() % ALIGN if on_cpu and tensor.device.type == "cpu" else 0
        step = ALIGN if on_cpu else 512
        at += (wanted - at) % step
        offsets.append(at)
        at += tensor.numel() * tensor.element_size()
    return offsets, at


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in the output of a module: tensors, tuples, lists, mappings, dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))
