"""What the allocator of an accelerator takes: more than the bytes of tensors.

From PyTorch's ``c10/cuda/CUDACachingAllocator.cpp``, whose design other accelerators share: sizes are rounded up to 512
bytes. Pieces of up to 1 MiB are cut out of segments of 2 MiB, pieces of up to 10 MiB out of segments of 20 MiB, larger
ones get a segment of their own of whole 2 MiB. What is left of a large segment behind a piece stays with the piece
unless it is more than 1 MiB, and counts as allocated.
"""

from __future__ import annotations

import os
import re

import torch

_STEP = 512  # kMinBlockSize
_SMALL = 1 << 20  # kSmallSize
_LARGE, _SEGMENT = 10 << 20, 2 << 20  # kMinLargeAlloc, kRoundLarge
_FILLED = 1.05  # of pieces of 1 to 10 MiB: up to 1 MiB in each segment of 20 is left with the last one


def fresh(nbytes: int) -> int:
    """Bytes that a tensor of ``nbytes`` takes in new memory."""
    rounded = -(-nbytes // _STEP) * _STEP
    if rounded <= _SMALL:
        return rounded
    if rounded < _LARGE:
        return int(rounded * _FILLED)
    segment = -(-rounded // _SEGMENT) * _SEGMENT
    return segment if segment - rounded <= _SMALL else rounded


def used_again(nbytes: int) -> int:
    """Bytes that a tensor of ``nbytes`` takes at most where memory was freed before: a little too much is left with it."""
    rounded = -(-nbytes // _STEP) * _STEP
    return rounded if rounded <= _SMALL else rounded + _SMALL


def libraries(device: torch.device) -> int:
    """Bytes that cuBLAS keeps on ``device`` and that cublasLt takes for a product; and a little for reductions."""
    return 2 * _cublas(device) + (2 << 20)


def _cublas(device: torch.device) -> int:
    """The workspace that PyTorch gives cuBLAS (``ATen/cuda/CublasHandlePool.cpp``): as the environment says, else 32 MiB
    from compute capability 9.0 on (128 MiB with ROCm), and 8 MiB and 128 KiB before."""
    wish = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if wish:
        return sum(int(size) * int(count) << 10 for size, count in wish)
    if torch.version.hip is not None:
        return 128 << 20
    known = device.type == "cuda" and torch.cuda.is_available()
    return 32 << 20 if not known or torch.cuda.get_device_capability(device)[0] >= 9 else (8 << 20) + (128 << 10)
