"""Results that several networks share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.outputs import BaseOutput


@dataclass
class Transformer2DModelOutput(BaseOutput):
    """What a transformer over images predicts: ``sample``, ``(B, C, H, W)`` or packed ``(B, L, C)``."""

    sample: Tensor
