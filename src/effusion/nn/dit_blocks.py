"""Blocks of diffusion transformers over image tokens (Peebles & Xie, 2022), with cross-attention in PixArt's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention
from .embeddings import CombinedTimestepLabelEmbeddings, PixArtAlphaCombinedTimestepSizeEmbeddings
from .feed_forward import FeedForward
from .modulation import add_gated, modulate


class AdaLayerNormSingle(nn.Module):
    """PixArt's modulation: one projection of the time for all blocks, to which each adds a table (Chen et al., 2023).

    ``forward`` gives the six vectors ``(B, 6 * D)`` and the embedded time ``(B, D)``.
    """

    def __init__(self, embedding_dim: int, use_additional_conditions: bool = False) -> None:
        super().__init__()
        self.emb = PixArtAlphaCombinedTimestepSizeEmbeddings(
            embedding_dim, size_emb_dim=embedding_dim // 3, use_additional_conditions=use_additional_conditions
        )
        self.silu = nn.SiLU()
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim)

    def forward(
        self, timestep: Tensor, sizes: Mapping[str, Tensor | None] | None, batch_size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        sizes = sizes or {}
        embedded = self.emb(timestep, sizes.get("resolution"), sizes.get("aspect_ratio"), batch_size, dtype)
        return self.linear(self.silu(embedded)), embedded


class LabelledAdaLayerNormZero(nn.Module):
    """Layer norm and five more vectors from time and class, which each block embeds for itself."""

    def __init__(self, dim: int, num_embeddings: int) -> None:
        super().__init__()
        self.emb = CombinedTimestepLabelEmbeddings(num_embeddings, dim)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, 6 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, ...]:
        emb = self.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulate(self.norm(x), shift, scale), *rest


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, both modulated and gated by time and class."""

    def __init__(
        self, dim: int, heads: int, dim_head: int, num_embeddings: int, *, eps: float, affine: bool, **common: Any
    ) -> None:
        super().__init__()
        self.norm1 = LabelledAdaLayerNormZero(dim, num_embeddings)
        self.attn1, self.ff = _attention(dim, heads, dim_head, None, **common), _feed_forward(dim, **common)
        self.norm3 = nn.LayerNorm(dim, eps, affine)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """``(B, L, D), (B,), (B,) -> (B, L, D)``."""
        x, gate1, shift, scale, gate2 = self.norm1(hidden_states, timestep, class_labels)
        x = add_gated(hidden_states, gate1, self.attn1(x, **kwargs))
        return add_gated(x, gate2, self.ff(modulate(self.norm3(x), shift, scale)))


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to text, feed-forward; the first and the last modulated and gated by the time."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        cross_attention_dim: int | None,
        *,
        eps: float,
        affine: bool,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        **common: Any,
    ) -> None:
        super().__init__()
        self.only_cross_attention, self.double_self_attention = only_cross_attention, double_self_attention
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.norm1 = nn.LayerNorm(dim, eps, affine)
        self.attn1 = _attention(dim, heads, dim_head, cross_attention_dim if only_cross_attention else None, **common)
        self.norm2 = nn.LayerNorm(dim, eps, affine)
        self.attn2 = None
        if cross_attention_dim is not None or double_self_attention:
            second = None if double_self_attention else cross_attention_dim
            self.attn2 = _attention(dim, heads, dim_head, second, **common)
        self.ff = _feed_forward(dim, **common)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        vectors: Tensor,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """``(B, L, D)``, text ``(B, S, D')``, masks ``(B, 1, L or S)``, vectors ``(B, 6 * D)`` -> ``(B, L, D)``."""
        table = self.scale_shift_table + vectors.unflatten(1, (6, -1))  # (B, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
        x = modulate(self.norm1(hidden_states), shift1, scale1)
        context = encoder_hidden_states if self.only_cross_attention else None
        x = add_gated(hidden_states, gate1, self.attn1(x, context, attention_mask, **kwargs))
        if self.attn2 is not None:
            context = None if self.double_self_attention else encoder_hidden_states
            x = x + self.attn2(x, context, encoder_attention_mask, **kwargs)
        return add_gated(x, gate2, self.ff(modulate(self.norm2(x), shift2, scale2)))


def _attention(
    dim: int, heads: int, dim_head: int, cross_attention_dim: int | None, *, activation_fn: str, **common: Any
) -> Attention:
    return Attention(dim, cross_attention_dim, heads=heads, dim_head=dim_head, **common)


def _feed_forward(dim: int, *, dropout: float, activation_fn: str, **common: Any) -> FeedForward:
    return FeedForward(dim, dropout=dropout, activation_fn=activation_fn)
