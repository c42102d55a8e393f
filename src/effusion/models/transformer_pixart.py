"""PixArt-alpha and PixArt-sigma (Chen et al., 2023 and 2024): a diffusion transformer with cross-attention to text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import ConfigMixin, register_to_config
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.dit_blocks import AdaLayerNormSingle, PixArtBlock
from ..nn.embeddings import PixArtAlphaTextProjection
from ..nn.masks import additive
from ..nn.modulation import modulate
from ..nn.patch import PatchEmbed, unpatchify
from .base import ModelMixin
from .modeling_outputs import Transformer2DModelOutput


class PixArtNetwork(nn.Module):
    """The network itself, for the two classes under which its checkpoints go."""

    config: Any
    use_additional_conditions: bool
    pos_embed: PatchEmbed
    transformer_blocks: nn.ModuleList

    def _build_pixart(self, only_cross_attention: bool = False, double_self_attention: bool = False) -> None:
        c = self.config
        dim = c.num_attention_heads * c.attention_head_dim
        out_channels = c.in_channels if c.out_channels is None else c.out_channels
        stretch = c.interpolation_scale if c.interpolation_scale is not None else max(c.sample_size // 64, 1)
        self.pos_embed = PatchEmbed(
            c.sample_size, c.sample_size, c.patch_size, c.in_channels, dim, interpolation_scale=stretch
        )
        self.transformer_blocks = nn.ModuleList(
            PixArtBlock(
                dim,
                c.num_attention_heads,
                c.attention_head_dim,
                c.cross_attention_dim,
                eps=c.norm_eps,
                affine=c.norm_elementwise_affine,
                only_cross_attention=only_cross_attention,
                double_self_attention=double_self_attention,
                dropout=c.dropout,
                activation_fn=c.activation_fn,
                bias=c.attention_bias,
                upcast_attention=c.upcast_attention,
            )
            for _ in range(c.num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, c.patch_size * c.patch_size * out_channels)
        self.adaln_single = AdaLayerNormSingle(dim, use_additional_conditions=self.use_additional_conditions)
        self.caption_projection = None
        if c.caption_channels is not None:
            self.caption_projection = PixArtAlphaTextProjection(c.caption_channels, dim)

    def _run_pixart(
        self,
        latents: Tensor,
        text: Tensor | None,
        timestep: Tensor | None,
        sizes: Mapping[str, Tensor] | None,
        mask: Tensor | None,
        text_mask: Tensor | None,
        kwargs: dict[str, Any] | None,
    ) -> Tensor:
        if timestep is None:
            raise ValueError("`timestep`, (B,), is needed")
        if self.use_additional_conditions and sizes is None:
            raise ValueError("`added_cond_kwargs` with resolution and aspect_ratio is needed by this network")
        height, width = (side // self.pos_embed.patch_size for side in latents.shape[-2:])
        x = self.pos_embed(latents)  # (B, L, D)
        vectors, embedded = self.adaln_single(timestep, sizes, x.shape[0], x.dtype)
        if self.caption_projection is not None and text is not None:
            text = self.caption_projection(text)
        masks = additive(mask, x.dtype), additive(text_mask, x.dtype)
        for block in self.transformer_blocks:
            x = checkpointing.run(self, block, x, masks[0], text, masks[1], vectors, kwargs or {})
        shift, scale = (self.scale_shift_table + embedded.unsqueeze(1)).chunk(2, dim=1)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))
        return unpatchify(x, height, width, self.pos_embed.patch_size)


class PixArtTransformer2DModel(ModelMixin, AttentionMixin, PixArtNetwork):
    """The PixArt denoiser.

    Args:
        sample_size: side of the latents that the network was trained on.
        interpolation_scale: how positions are stretched; ``None``: by the sample size in units of 64.
        use_additional_conditions: take resolution and aspect ratio; ``None``: if the sample size is 128.
        caption_channels: width of the text features.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PixArtBlock", "PatchEmbed"]
    _repeated_blocks = ["PixArtBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single"]
    has_compatibles = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
    ) -> None:
        super().__init__()
        if norm_type != "ada_norm_single":
            raise ValueError(f"norm_type {norm_type!r}: a PixArt transformer has 'ada_norm_single'")
        if use_additional_conditions is None:
            use_additional_conditions = sample_size == 128
        self.use_additional_conditions = use_additional_conditions
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False
        self._build_pixart()

    @classmethod
    def _get_compatibles(cls) -> list[type[ConfigMixin]]:
        from .transformer_2d import Transformer2DModel  # the name that old checkpoints have

        return [Transformer2DModel]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (and its variance, if there are twice the channels).

        Args:
            hidden_states: ``(B, C, H, W)``, latents.
            encoder_hidden_states: ``(B, S, caption_channels)``, T5 features.
            timestep: ``(B,)``.
            added_cond_kwargs: ``resolution`` ``(B, 2)`` and ``aspect_ratio`` ``(B, 1)`` if the network takes them.
            cross_attention_kwargs: handed to the attention processors.
            attention_mask, encoder_attention_mask: ``(B, L)`` and ``(B, S)`` of 1 (seen) and 0, or added to scores.
        """
        output = self._run_pixart(
            hidden_states,
            encoder_hidden_states,
            timestep,
            added_cond_kwargs,
            attention_mask,
            encoder_attention_mask,
            cross_attention_kwargs,
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
