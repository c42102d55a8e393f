"""FLUX.1 Redux (Black Forest Labs, 2024): image features as text tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from .base import ModelMixin


@dataclass
class ReduxImageEncoderOutput(BaseOutput):
    """Tokens ``(B, L, txt_in_features)`` to put behind the text's."""

    image_embeds: Tensor | None = None


class ReduxImageEncoder(ModelMixin):
    """Two linear layers from SigLIP features ``(B, L, redux_dim)`` to the text tokens of FLUX.1."""

    @register_to_config
    def __init__(self, redux_dim: int = 1152, txt_in_features: int = 4096) -> None:
        super().__init__()
        self.redux_up = nn.Linear(redux_dim, txt_in_features * 3)
        self.redux_down = nn.Linear(txt_in_features * 3, txt_in_features)

    def forward(self, x: Tensor) -> ReduxImageEncoderOutput:
        return ReduxImageEncoderOutput(image_embeds=self.redux_down(F.silu(self.redux_up(x))))
