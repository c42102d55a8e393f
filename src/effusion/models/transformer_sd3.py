"""Stable Diffusion 3 and 3.5 (Esser et al., 2024): rectified-flow transformers over image and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.embeddings import CombinedTimestepTextProjEmbeddings
from ..nn.feed_forward import FeedForward, chunked
from ..nn.joint_attention import JointAttention
from ..nn.modulation import AdaLayerNormContinuous, AdaLayerNormZero, add_gated, modulate
from ..nn.patch import PatchEmbed, unpatchify
from .base import ModelMixin
from .modeling_outputs import Transformer2DModelOutput


class _ChunkedBlock(nn.Module):
    """A block whose feed-forward can be computed in parts (Kitaev et al., 2020)."""

    _chunk_size: int | None = None
    _chunk_dim = 0

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Compute the feed-forward for ``chunk_size`` positions of dimension ``dim`` at a time; ``None``: all."""
        self._chunk_size, self._chunk_dim = chunk_size, dim

    def feed(self, ff: nn.Module, x: Tensor) -> Tensor:
        return chunked(ff, x, self._chunk_size, self._chunk_dim)


class JointTransformerBlock(_ChunkedBlock):
    """Two streams with one attention over both; the image's with a second attention of its own if ``dual``.

    Args:
        context_pre_only: the text only informs the image here and its stream ends (the last block).
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        context_pre_only: bool = False,
        qk_norm: str | None = None,
        use_dual_attention: bool = False,
    ) -> None:
        super().__init__()
        heads = (dim, num_attention_heads, attention_head_dim)
        self.context_pre_only, self.use_dual_attention = context_pre_only, use_dual_attention
        self.norm1 = AdaLayerNormZero(dim, parts=9 if use_dual_attention else 6)
        self.norm1_context: AdaLayerNormZero | AdaLayerNormContinuous
        if context_pre_only:
            self.norm1_context = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        else:
            self.norm1_context = AdaLayerNormZero(dim)
        self.attn = JointAttention(*heads, context_dim=dim, qk_norm=qk_norm, context_out=not context_pre_only)
        self.attn2 = JointAttention(*heads, qk_norm=qk_norm) if use_dual_attention else None
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")
        self.norm2_context = None if context_pre_only else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff_context = None if context_pre_only else FeedForward(dim, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """``(B, L, D), (B, L_text, D), (B, D)`` -> the text tokens (``None`` if they end here), the image tokens."""
        kwargs = joint_attention_kwargs or {}
        shift1, scale1, gate1, shift, scale, gate2, *dual = self.norm1.vectors(temb)
        normed = self.norm1.norm(hidden_states)
        if self.context_pre_only:
            y, context = self.norm1_context(encoder_hidden_states, temb), None
        else:
            y, *context = self.norm1_context(encoder_hidden_states, temb)
        x, y = self.attn(modulate(normed, shift1, scale1), y, **kwargs)

        x = add_gated(hidden_states, gate1, x)
        if self.attn2 is not None:
            x = add_gated(x, dual[2], self.attn2(modulate(normed, dual[0], dual[1]), **kwargs))
        x = add_gated(x, gate2, self.feed(self.ff, modulate(self.norm2(x), shift, scale)))
        return self._text(encoder_hidden_states, y, context), x

    def _text(self, y: Tensor, attention: Tensor, context: Sequence[Tensor] | None) -> Tensor | None:
        if context is None or self.norm2_context is None or self.ff_context is None:
            return None
        gate1, shift, scale, gate2 = context
        y = add_gated(y, gate1, attention)
        y = add_gated(y, gate2, self.feed(self.ff_context, modulate(self.norm2_context(y), shift, scale)))
        return y.clip(-65504, 65504) if y.dtype == torch.float16 else y


class SD3SingleTransformerBlock(_ChunkedBlock):
    """The image's stream alone, for control networks without text."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = JointAttention(dim, num_attention_heads, attention_head_dim, qk_norm=None)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """``(B, L, D), (B, D) -> (B, L, D)``."""
        x, gate1, shift, scale, gate2 = self.norm1(hidden_states, temb)
        x = add_gated(hidden_states, gate1, self.attn(x))
        return add_gated(x, gate2, self.feed(self.ff, modulate(self.norm2(x), shift, scale)))


class SD3Base(ModelMixin, AttentionMixin):
    """What the denoiser and its control network share."""

    _supports_gradient_checkpointing = True
    transformer_blocks: nn.ModuleList

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Compute feed-forwards for ``chunk_size`` (1) batch items (``dim=0``) or tokens (``dim=1``) at a time.

        Raises:
            ValueError: another ``dim``.
        """
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (batch) or 1 (tokens), not {dim}")
        for block in self.transformer_blocks:
            block.set_chunk_feed_forward(chunk_size or 1, dim)  # type: ignore[operator]

    def disable_forward_chunking(self) -> None:
        """Compute feed-forwards at once again."""
        for block in self.transformer_blocks:
            block.set_chunk_feed_forward(None)  # type: ignore[operator]


class SD3Transformer2DModel(SD3Base):
    """The Stable Diffusion 3 denoiser.

    Args:
        sample_size: side of the latents that the network was trained on.
        pos_embed_max_size: side of the table of positions, in patches.
        dual_attention_layers: blocks with a second attention over the image alone (3.5 medium).
        qk_norm: ``"rms_norm"`` for 3.5.
    """

    _no_split_modules = ["JointTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels if out_channels is not None else in_channels
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, dim, pos_embed_max_size=pos_embed_max_size
        )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                context_pre_only=i == num_layers - 1,
                qk_norm=qk_norm,
                use_dual_attention=i in dual_attention_layers,
            )
            for i in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor = None,  # type: ignore[assignment]
        pooled_projections: Tensor = None,  # type: ignore[assignment]
        timestep: Tensor = None,  # type: ignore[assignment]
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow's velocity.

        Args:
            hidden_states: ``(B, C, H, W)``, latents.
            encoder_hidden_states: ``(B, L_text, joint_attention_dim)``, CLIP and T5 features.
            pooled_projections: ``(B, pooled_projection_dim)``, pooled CLIP features.
            timestep: ``(B,)`` from 0 to 1000.
            block_controlnet_hidden_states: ``(B, L, D)`` each, added behind the blocks, each for several in a row.
            joint_attention_kwargs: handed to the attention processors.
            skip_layers: indices of blocks to leave out (skip-layer guidance).
        """
        height, width = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        x = self.pos_embed(hidden_states)  # (B, L, D)
        temb = self.time_text_embed(timestep, pooled_projections)
        y = self.context_embedder(encoder_hidden_states)  # (B, L_text, D)
        kwargs = self._attention_kwargs(joint_attention_kwargs, timestep)

        samples = block_controlnet_hidden_states
        for i, block in enumerate(self.transformer_blocks):
            if skip_layers is None or i not in skip_layers:
                y, x = checkpointing.run(self, block, x, y, temb, kwargs)
            if samples is not None and not block.context_pre_only:
                x = x + samples[int(i / (len(self.transformer_blocks) / len(samples)))]

        x = self.proj_out(self.norm_out(x, temb))
        output = unpatchify(x, height, width, self.config.patch_size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _attention_kwargs(self, given: dict[str, Any] | None, timestep: Tensor) -> dict[str, Any] | None:
        if given is None or "ip_adapter_image_embeds" not in given:
            return given
        rest = {k: v for k, v in given.items() if k != "ip_adapter_image_embeds"}
        image, image_temb = self.image_proj(given["ip_adapter_image_embeds"], timestep)
        return {**rest, "ip_hidden_states": image, "temb": image_temb}
