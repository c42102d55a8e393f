"""FLUX.1 (Black Forest Labs, 2024): a rectified-flow transformer, first two streams of tokens, then one."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..core import log
from ..core.config import register_to_config
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, CombinedTimestepTextProjEmbeddings
from ..nn.feed_forward import FeedForward, gelu_beside
from ..nn.joint_attention import FluxAttention
from ..nn.modulation import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle, add_gated, modulate
from ..nn.rotary import AxialRotary
from .base import ModelMixin
from .modeling_outputs import Transformer2DModelOutput

logger = log.get_logger(__name__)


class FluxTransformerBlock(nn.Module):
    """Two streams, image and text, each with modulation and feed-forward of its own, and one attention over both."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.norm1_context = AdaLayerNormZero(dim)
        self.attn = FluxAttention(
            dim, num_attention_heads, attention_head_dim, bias=True, added_kv_proj_dim=dim, out_dim=dim, eps=eps
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")
        self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff_context = FeedForward(dim, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, L, D), (B, L_text, D), (B, D)`` -> the text tokens and the image tokens."""
        x, gate1, shift, scale, gate2 = self.norm1(hidden_states, temb)
        y, gate1_c, shift_c, scale_c, gate2_c = self.norm1_context(encoder_hidden_states, temb)
        x, y, *image_prompt = self.attn(x, y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))

        x = add_gated(hidden_states, gate1, x)
        x = add_gated(x, gate2, self.ff(modulate(self.norm2(x), shift, scale)))
        y = add_gated(encoder_hidden_states, gate1_c, y)
        y = add_gated(y, gate2_c, self.ff_context(modulate(self.norm2_context(y), shift_c, scale_c)))
        for extra in image_prompt:  # an IP-Adapter's processor gives a third result
            x = x + extra
        return _within_half(y), x


class FluxSingleTransformerBlock(nn.Module):
    """One stream; attention and feed-forward side by side (Dehghani et al., 2023), with one projection behind both."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        inner = int(dim * mlp_ratio)
        self.norm = AdaLayerNormZeroSingle(dim)
        self.proj_mlp = nn.Linear(dim, inner)
        self.proj_out = nn.Linear(dim + inner, dim)
        self.attn = FluxAttention(
            dim, num_attention_heads, attention_head_dim, bias=True, out_dim=dim, eps=1e-6, pre_only=True
        )

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """``(B, L_text + L, D), (B, D)`` -> all tokens."""
        x, gate = self.norm(hidden_states, temb)
        attention = self.attn(x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = self.proj_out(gelu_beside(attention, self.proj_mlp(x)))
        return _within_half(add_gated(hidden_states, gate, x))


def _within_half(x: Tensor) -> Tensor:
    """Without the infinities that float16 makes of the few very large activations."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FluxTransformer2DModel(ModelMixin, AttentionMixin):
    """The FLUX.1 denoiser.

    Args:
        in_channels: channels of a packed token: 64; 128 with a control image, 384 with fill mask and image.
        guidance_embeds: whether the model is distilled with a guidance strength as input ("dev").
        axes_dims_rope: channels of a head that turn with each axis of the token positions.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
    ) -> None:
        super().__init__()
        self.out_channels = out_channels or in_channels
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.pos_embed = AxialRotary(10000, axes_dims_rope)
        self.time_text_embed = time_text_embedding(guidance_embeds, dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.x_embedder = nn.Linear(in_channels, dim)
        heads = (dim, num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList([FluxTransformerBlock(*heads) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [FluxSingleTransformerBlock(*heads) for _ in range(num_single_layers)]
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
        img_ids: Tensor = None,  # type: ignore[assignment]
        txt_ids: Tensor = None,  # type: ignore[assignment]
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow's velocity.

        Args:
            hidden_states: ``(B, L, in_channels)``, packed latents.
            encoder_hidden_states: ``(B, L_text, joint_attention_dim)``, T5 features.
            pooled_projections: ``(B, pooled_projection_dim)``, the pooled CLIP feature.
            timestep: ``(B,)`` from 0 to 1.
            img_ids, txt_ids: ``(L, 3)`` and ``(L_text, 3)``, positions of the tokens.
            guidance: ``(B,)``, for models with ``guidance_embeds``.
            joint_attention_kwargs: handed to the attention processors.
            controlnet_block_samples, controlnet_single_block_samples: ``(B, L, D)`` each, added behind blocks:
                one sample for several blocks in a row, or in turns with ``controlnet_blocks_repeat``.
        """
        x = self.x_embedder(hidden_states)  # (B, L, D)
        temb = embed_conditions(self.time_text_embed, x.dtype, timestep, guidance, pooled_projections)
        y = self.context_embedder(encoder_hidden_states)  # (B, L_text, D)
        rotary = self.pos_embed(unbatched(txt_ids, "txt_ids"), unbatched(img_ids, "img_ids"))
        kwargs = self._attention_kwargs(joint_attention_kwargs)

        for i, block in enumerate(self.transformer_blocks):
            y, x = checkpointing.run(self, block, x, y, temb, rotary, kwargs)
            if controlnet_block_samples is not None:
                n = len(controlnet_block_samples)
                which = i % n if controlnet_blocks_repeat else i // ceil(len(self.transformer_blocks) / n)
                x = x + controlnet_block_samples[which]

        length = y.shape[1]
        x = torch.cat((y, x), dim=1)  # (B, L_text + L, D)
        for i, block in enumerate(self.single_transformer_blocks):
            x = checkpointing.run(self, block, x, temb, rotary, kwargs)
            if controlnet_single_block_samples is not None:
                n = len(controlnet_single_block_samples)
                sample = controlnet_single_block_samples[i // ceil(len(self.single_transformer_blocks) / n)]
                x = torch.cat((x[:, :length], x[:, length:] + sample), dim=1)

        output = self.proj_out(self.norm_out(x[:, length:], temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _attention_kwargs(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is None or "ip_adapter_image_embeds" not in given:
            return given
        rest = {k: v for k, v in given.items() if k != "ip_adapter_image_embeds"}
        return {**rest, "ip_hidden_states": self.encoder_hid_proj(given["ip_adapter_image_embeds"])}


def time_text_embedding(guidance_embeds: bool, dim: int, pooled_dim: int) -> nn.Module:
    """The module for :func:`embed_conditions`."""
    if guidance_embeds:
        return CombinedTimestepGuidanceTextProjEmbeddings(dim, pooled_dim)
    return CombinedTimestepTextProjEmbeddings(dim, pooled_dim)


def embed_conditions(
    module: nn.Module, dtype: torch.dtype, timestep: Tensor, guidance: Tensor | None, pooled: Tensor
) -> Tensor:
    """Timestep, guidance and pooled text as one vector ``(B, D)``; the network counts time and guidance in 1/1000.

    Raises:
        ValueError: the network needs ``guidance`` and there is none.
    """
    if not isinstance(module, CombinedTimestepGuidanceTextProjEmbeddings):
        return module(timestep.to(dtype) * 1000, pooled)  # type: ignore[no-any-return]
    if guidance is None:
        raise ValueError("this FLUX model is distilled with guidance (`guidance_embeds`): pass `guidance`, (B,)")
    return module(timestep.to(dtype) * 1000, guidance.to(dtype) * 1000, pooled)  # type: ignore[no-any-return]


def unbatched(ids: Tensor, name: str) -> Tensor:
    """Positions ``(L, 3)``; those of the first item if there is a batch."""
    if ids.ndim == 3:
        logger.warning("`%s` with a batch dimension is deprecated; pass (L, 3)", name)
        return ids[0]
    return ids
