"""Arithmetic in the memory of *fresh* tensors: results of the last operation, which nobody else holds.

Writing there saves an allocation (on the CPU, page faults on megabytes). While gradients are recorded
the ordinary operations run, as the backward pass may need what would be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add(fresh: Tensor, x: Tensor) -> Tensor:
    """``fresh + x``."""
    return fresh + x if torch.is_grad_enabled() or fresh.dtype != x.dtype else fresh.add_(x)


def mul(fresh: Tensor, x: Tensor) -> Tensor:
    """``fresh * x``."""
    return fresh * x if torch.is_grad_enabled() or fresh.dtype != x.dtype else fresh.mul_(x)


def silu(fresh: Tensor) -> Tensor:
    """``SiLU(fresh)``."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


def version_of(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """``activation`` for fresh tensors, if there is such a version of it."""
    return silu if type(activation) is nn.SiLU else activation
