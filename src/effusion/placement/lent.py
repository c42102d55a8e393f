"""What stands in the place of a resting weight for the time of a call, and what a call leaves behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .units import Slot


class _Straight(torch.autograd.Function):
    """Forward: the fetched weight. Backward: the gradient goes to the resting one."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, tensor: Tensor) -> Tensor:
        ctx.home = rest.device, rest.dtype
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        device, dtype = ctx.home
        return grads[0].to(device=device, dtype=dtype), None


def lend(tensor: Tensor, rest: Tensor) -> Tensor:
    """``tensor``, fetched, as what stands in the place of ``rest`` for the time of a call."""
    fresh = tensor.data  # counts its changes in place from zero
    if not isinstance(rest, nn.Parameter):
        return fresh
    if rest.requires_grad and torch.is_grad_enabled():
        return _Straight.apply(rest, fresh)  # type: ignore[no-any-return, no-untyped-call]
    # as it rests, or compiled code compiles again; but autocast keeps a copy of every weight that asks for gradients
    asks = rest.requires_grad and not torch.is_autocast_enabled(tensor.device.type)
    lent = nn.Parameter(fresh, requires_grad=asks)
    if rest.__dict__:
        lent.__dict__.update(rest.__dict__)
    return lent


def writes_unseen(slot: Slot) -> bool:
    """Batch norm changes its statistics in a kernel that counts no versions."""
    return slot.is_buffer and slot.module.training and isinstance(slot.module, nn.modules.batchnorm._NormBase)
