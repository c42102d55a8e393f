"""Memory that operators take for the time of a call, beside what they return; on the CPU first.

Convolutions run in oneDNN's blocked layouts: operands are copied into blocks of sixteen channels and the result is
copied back, so that for a moment there are two of each. Attention works through tiles, one set per thread. The
figures were measured operator by operator (``benchmarks/forecast.py --operators``) and follow from sizes alone. For
accelerators there are bounds that were not measured (:func:`accelerated`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

_BLOCK = 16  # channels
_TILE = (256, 512)  # queries, keys per tile of attention
_PARTIAL = 9 << 20  # bytes of partial results: float32 tiles of 128 x 128 for each of 132 multiprocessors
_SMALL = 20_480  # elements of one picture below which convolutions run without oneDNN


KERNEL = 200 << 10  # bytes of code and tables that oneDNN keeps for every shape of convolution it has met


_compiled: set[Any] = set()  # kernels of this process, of earlier runs


def compiled(kernels: Iterable[Any]) -> None:
    """A run has compiled ``kernels``, unless they were there before."""
    _compiled.update(kernels)


def fresh(kernels: set[Any]) -> set[Any]:
    """Those of ``kernels`` that are still to be compiled."""
    return kernels - _compiled


def kernel(name: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What tells the kernel that the operator ``name`` is compiled to from others, if it is compiled at all."""
    if not name.startswith("aten.convolution"):
        return None
    return (tuple(args[0].shape), tuple(args[1].shape), args[0].dtype, args[0].stride(), tuple(args[3]))


def workspace(name: str, args: tuple[Any, ...], out: Any) -> int:
    """Bytes that the operator ``name`` needs on the CPU beside its inputs and its result.

    Args:
        name: of the operator, as in ``aten.convolution.default``.
        args: its positional arguments.
        out: what it returned.
    """
    if name.startswith("aten.convolution") and isinstance(out, Tensor):
        return _convolution(args[0], args[1], args[3], args[6] if len(args) > 6 else False, out)
    if "scaled_dot_product" in name and isinstance(args[0], Tensor):
        return _attention(args[0])
    return 0


def accelerated(name: str, args: tuple[Any, ...], out: Any) -> int:
    """The same on an accelerator, as an upper bound: nothing says what cuDNN will choose.

    Its convolutions on tensor cores compute with channels last. Pictures that lie in planes are turned on the way in and
    out, with channels in whole groups of eight; of weights PyTorch itself makes a turned copy. Attention adds up partial
    results of keys that were shared out to multiprocessors, and in float32 where heads are wider than 128 numbers.
    """
    if name.startswith("aten.convolution") and isinstance(out, Tensor):
        x, weight = args[0], args[1]
        turned = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        moved = min(4 * out.numel(), _PARTIAL) if turned else _blocked(x, group=8) + _blocked(out, group=8)
        return moved + _blocked(weight, 2, group=8)
    if "scaled_dot_product" in name and isinstance(args[0], Tensor):
        wide = args[0].shape[-1] > 128
        return _PARTIAL + (4 * args[0].numel() if wide else 0)
    return 0


def _convolution(x: Tensor, weight: Tensor, stride: Any, transposed: bool, out: Tensor) -> int:
    """Blocked input, weights and result live together; then the blocked result and the plain one."""
    kernel = prod(weight.shape[2:])
    if not _in_blocks(x, weight, stride, transposed):
        return x.shape[1] * kernel * prod(out.shape[2:]) * x.itemsize if kernel > 1 else 0  # unfolded columns
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return _blocked(weight, 2)
    blocked_out = _blocked(out)
    first = _blocked(x) + _blocked(weight, 2) + blocked_out
    if kernel == 1 and x.dtype is not torch.float32:
        first += _blocked(x)
    return max(first, blocked_out + out.nbytes) - out.nbytes


def _in_blocks(x: Tensor, weight: Tensor, stride: Any, transposed: bool) -> bool:
    """Whether the convolution runs in oneDNN; small pictures, and 1x1 on one thread, don't."""
    if x.dtype is not torch.float32:
        return True
    kernel = weight.shape[2:]
    spread = transposed or max(stride) > 1 or x.shape[0] >= 16 or max(kernel) > 1 or torch.get_num_threads() > 1
    return spread and (min(kernel) > 3 or x.shape[0] > 1 or x.numel() > _SMALL)


def _blocked(tensor: Tensor, channel_dims: int = 1, group: int = _BLOCK) -> int:
    """Bytes of ``tensor`` with its channels filled up to whole blocks: dimension 1, or 0 and 1 of weights."""
    shape = list(tensor.shape)
    for dim in (1,) if channel_dims == 1 else (0, 1):
        shape[dim] = -(-shape[dim] // group) * group
    return prod(shape) * tensor.itemsize


def _attention(query: Tensor) -> int:
    """A tile of scores and one of results for each thread."""
    queries = min(query.shape[-2], _TILE[0])
    return int(torch.get_num_threads() * queries * (_TILE[1] + query.shape[-1]) * 4)
