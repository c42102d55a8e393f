"""Transformers over the pixels of feature maps, with cross-attention to a context (Rombach et al., 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checkpointing, fresh
from .attention import Attention
from .feed_forward import FeedForward, chunked
from .pixels import ConvToFeatureMap, ConvToTokens, feature_map, tokens


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a layer norm and added to its input.

    Args:
        cross_attention_dim: width of the context; ``None`` leaves the cross-attention out.
        only_cross_attention: the first attention looks at the context too.
        double_self_attention: the second attention looks at the input too.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        dropout: float = 0.0,
        cross_attention_dim: int | None = None,
        activation_fn: str = "geglu",
        attention_bias: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = dict(
            heads=num_attention_heads,
            dim_head=attention_head_dim,
            dropout=dropout,
            bias=attention_bias,
            upcast_attention=upcast_attention,
        )
        self.only_cross_attention, self.double_self_attention = only_cross_attention, double_self_attention
        self.chunk_size: int | None = None
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn1 = Attention(dim, cross_attention_dim if only_cross_attention else None, **common)
        self.attn2: Attention | None = None
        if cross_attention_dim is not None or double_self_attention:
            self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
            self.attn2 = Attention(dim, None if double_self_attention else cross_attention_dim, **common)
        self.norm3 = nn.LayerNorm(dim, eps=norm_eps)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn)

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 1) -> None:
        """Compute the feed-forward part for ``chunk_size`` positions along ``dim`` at a time."""
        self.chunk_size, self.chunk_dim = chunk_size, dim

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """``(B, L, D), context (B, S, D') -> (B, L, D)``; masks ``(B, 1, L)``, ``(B, 1, S)`` are added to scores."""
        x, more = hidden_states, cross_attention_kwargs or {}
        first = encoder_hidden_states if self.only_cross_attention else None
        x = x + self.attn1(self.norm1(x), first, attention_mask, **more)
        if self.attn2 is not None:
            second = None if self.double_self_attention else encoder_hidden_states
            x = x + self.attn2(self.norm2(x), second, encoder_attention_mask, **more)
        h = self.norm3(x)
        h = self.ff(h) if self.chunk_size is None else chunked(self.ff, h, self.chunk_size, self.chunk_dim)
        return fresh.add(h, x)


class Transformer2DModel(nn.Module):
    """Norm, projection, transformer blocks over the pixels, projection, added to the input."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = None,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        inner = num_attention_heads * attention_head_dim
        self.use_linear_projection = use_linear_projection
        self.gradient_checkpointing = False
        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear_projection else ConvToTokens(in_channels, inner)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                cross_attention_dim=cross_attention_dim,
                only_cross_attention=only_cross_attention,
                double_self_attention=double_self_attention,
                upcast_attention=upcast_attention,
            )
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(inner, in_channels) if use_linear_projection else ConvToFeatureMap(inner, in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, C, H, W), context (B, S, D) -> (B, C, H, W)``."""
        size = hidden_states.shape[2:]
        x = self.norm(hidden_states)
        if self.use_linear_projection:
            x = self.proj_in(tokens(x).contiguous())
        else:
            x = tokens(self.proj_in(x)).contiguous()  # (B, H * W, D)
        for block in self.transformer_blocks:
            x = checkpointing.run(
                self, block, x, attention_mask, encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs
            )
        if self.use_linear_projection:
            return hidden_states + feature_map(self.proj_out(x), size)
        return fresh.add(self.proj_out(feature_map(x, size)), hidden_states)


class DualTransformer2DModel(nn.Module):
    """Two transformers, each for a part of the context, mixed (Versatile Diffusion, Xu et al., 2022).

    Attributes:
        condition_lengths: tokens of each part of the context.
        transformer_index_for_condition: which transformer a part goes to.
        mix_ratio: share of the first part in the sum.
    """

    def __init__(self, num_attention_heads: int, attention_head_dim: int, in_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.transformers = nn.ModuleList(
            Transformer2DModel(num_attention_heads, attention_head_dim, in_channels, **kwargs) for _ in range(2)
        )
        self.mix_ratio = 0.5
        self.condition_lengths = [77, 257]
        self.transformer_index_for_condition = [1, 0]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, C, H, W), context (B, sum of condition_lengths, D) -> (B, C, H, W)``."""
        changes, start = [], 0
        for length, index in zip(self.condition_lengths, self.transformer_index_for_condition, strict=True):
            part = encoder_hidden_states[:, start : start + length]
            changes.append(self.transformers[index](hidden_states, part, cross_attention_kwargs) - hidden_states)
            start += length
        return changes[0] * self.mix_ratio + changes[1] * (1 - self.mix_ratio) + hidden_states
