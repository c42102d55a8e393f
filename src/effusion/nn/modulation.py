"""Adaptive layer norm (Peebles & Xie, 2022): scale, shift and gates that the conditioning decides.

All projections of the conditioning depend on it alone, so they can be computed for all steps of a run in advance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; ``(B, L, D)`` with ``shift`` and ``scale`` ``(B, D)`` or ``(B, L, D)``."""
    shift, scale = (t.unsqueeze(1) if t.ndim == 2 else t for t in (shift, scale))
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``x + gate * update``; ``(B, L, D)`` with ``gate`` ``(B, D)`` or ``(B, L, D)``."""
    return torch.addcmul(x, gate.unsqueeze(1) if gate.ndim == 2 else gate, update)


class AdaLayerNormZero(nn.Module):
    """Layer norm with ``parts`` vectors projected from the conditioning: shift, scale, and more for the block to use.

    ``forward(x, emb)`` with ``(B, L, D)`` and ``(B, D)`` gives the modulated ``x`` and the other ``parts - 2``
    vectors ``(B, D)``.
    """

    def __init__(self, dim: int, parts: int = 6, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__()
        self.parts = parts
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, parts * dim, bias=bias)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)

    def vectors(self, emb: Tensor) -> tuple[Tensor, ...]:
        """All ``parts`` projections of the conditioning, ``(B, D)`` each."""
        return self.linear(self.silu(emb)).chunk(self.parts, dim=1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *rest = self.vectors(emb)
        return modulate(self.norm(x), shift, scale), *rest


class AdaLayerNormContinuous(nn.Module):
    """Layer norm with scale and shift from the conditioning, in this order: the last one of a network."""

    def __init__(
        self,
        embedding_dim: int,
        conditioning_embedding_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(conditioning_embedding_dim, embedding_dim * 2, bias=bias)
        self.norm = nn.LayerNorm(embedding_dim, eps, elementwise_affine, bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(emb).to(x.dtype)).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale)


class AdaLayerNormZeroSingle(AdaLayerNormZero):
    """Layer norm with three vectors: shift, scale and a gate; gives the modulated ``x`` and the gate."""

    def __init__(self, embedding_dim: int, norm_type: str = "layer_norm", bias: bool = True) -> None:
        if norm_type != "layer_norm":
            raise ValueError(f"norm_type={norm_type!r}: there is 'layer_norm' only")
        super().__init__(embedding_dim, parts=3, bias=bias)
