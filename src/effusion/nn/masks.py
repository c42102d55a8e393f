"""Masks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``(B, S)`` of 1 (seen) and 0 as numbers to add to scores, ``(B, 1, S)``; other masks stay as they are."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
