"""Where a tensor lies: a slice of a file, read or mapped when it is needed and not before."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import CheckpointError

_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True)
class TensorSlice:
    """The bytes of one tensor: ``nbytes`` at ``offset`` of ``path``, row-major and little-endian."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """A fresh tensor, read without mapping the file.

        Raises:
            CheckpointError: the file has become shorter than the slice.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        if self.nbytes:
            target = out.view(-1).view(torch.uint8).numpy().data
            with self.path.open("rb") as file:
                file.seek(self.offset)
                got = file.readinto(target)
            if got != self.nbytes:
                raise CheckpointError(f"{self.path}: {got} bytes left where a tensor of {self.nbytes} was; it changed")
        return out


def check_sizes(where: str, shape: Sequence[int]) -> None:
    """Refuse sizes that no tensor can have, though there may be no values at all because one of them is zero.

    Raises:
        CheckpointError: with ``where``.
    """
    if math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise CheckpointError(f"{where}: the shape {list(shape)} is too large for any machine")


class MappedFile:
    """A private, copy-on-write mapping of a file: tensors over it cost no memory until they are read.

    Writing to such a tensor changes this process's copy of the page, never the file. The mapping
    lives as long as any tensor over it. A file that is *replaced* (as every save here does) leaves
    old mappings intact; one that is truncated in place while mapped can't be survived by any
    mapping, for such places there is ``disable_mmap=True``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise CheckpointError(f"{path} is empty")
            self._map = _map_private(file.fileno())

    def bytes(self, start: int, stop: int) -> bytes:
        return self._map[start:stop]

    def tensor(self, part: TensorSlice) -> Tensor:
        """The tensor of ``part`` over the mapping; copied only where the file misaligns it."""
        if part.nbytes == 0:
            return torch.empty(part.shape, dtype=part.dtype)
        if part.offset % part.dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=part.nbytes, offset=part.offset)
            copy = raw.clone().view(part.dtype).view(part.shape)
            self.release(part)
            return copy
        count = part.nbytes // part.dtype.itemsize
        return torch.frombuffer(self._map, dtype=part.dtype, count=count, offset=part.offset).view(part.shape)

    def release(self, part: TensorSlice) -> None:
        """Give the pages of ``part`` back to the system; whoever still looks at them reads the file again."""
        page = mmap.PAGESIZE
        start = -(-part.offset // page) * page
        stop = (part.offset + part.nbytes) // page * page
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _map_private(fileno: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(fileno, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(fileno, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, row-major, on the host; copied only if it is elsewhere or strided."""
    flat = tensor.detach().resolve_conj().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
