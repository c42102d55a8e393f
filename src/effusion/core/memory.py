"""Large tensors on the host in huge pages: the system hands them out once per 2 MiB instead of once per 4 KiB.

For tensors that live for one call: gigabytes that stay make the system move other pages to find room, which takes longer
than what is won.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes; below that nothing is to be gained


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """``torch.empty``; on the CPU of a Linux system a large tensor asks for huge pages."""
    return in_huge_pages(torch.empty(tuple(shape), dtype=dtype, device=device))


def in_huge_pages(fresh: Tensor) -> Tensor:
    """``fresh``, whose memory was not written to yet, with huge pages asked for if it is large and on the CPU."""
    advise = _madvise()
    if advise is not None and fresh.device.type == "cpu" and fresh.nbytes >= _LARGE:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (fresh.data_ptr() + fresh.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, length, mmap.MADV_HUGEPAGE)  # a hint: what it answers makes no difference
    return fresh


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function  # type: ignore[no-any-return]
