"""DiT (Peebles & Xie, 2022): a diffusion transformer over latent patches, conditioned on a class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.config import ConfigMixin, register_to_config
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.dit_blocks import DiTBlock
from ..nn.modulation import modulate
from ..nn.patch import PatchEmbed, unpatchify
from .base import ModelMixin
from .modeling_outputs import Transformer2DModelOutput


class DiTNetwork(nn.Module):
    """The network itself, for the two classes under which its checkpoints go."""

    config: Any
    pos_embed: PatchEmbed
    transformer_blocks: nn.ModuleList

    def _build_dit(self, interpolation_scale: float = 1) -> None:
        c = self.config
        if c.num_embeds_ada_norm is None:
            raise ValueError("norm_type 'ada_norm_zero' needs num_embeds_ada_norm, the number of classes")
        dim = c.num_attention_heads * c.attention_head_dim
        self.pos_embed = PatchEmbed(
            c.sample_size, c.sample_size, c.patch_size, c.in_channels, dim, interpolation_scale=interpolation_scale
        )
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(
                dim,
                c.num_attention_heads,
                c.attention_head_dim,
                c.num_embeds_ada_norm,
                eps=c.norm_eps,
                affine=c.norm_elementwise_affine,
                dropout=c.dropout,
                activation_fn=c.activation_fn,
                bias=c.attention_bias,
                upcast_attention=c.upcast_attention,
            )
            for _ in range(c.num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, c.patch_size * c.patch_size * (c.out_channels or c.in_channels))

    def _run_dit(
        self, latents: Tensor, timestep: Tensor | None, class_labels: Tensor | None, kwargs: dict[str, Any] | None
    ) -> Tensor:
        if timestep is None or class_labels is None:
            raise ValueError("a class-conditional transformer needs `timestep`, (B,), and `class_labels`, (B,)")
        height, width = (side // self.pos_embed.patch_size for side in latents.shape[-2:])
        x = self.pos_embed(latents)  # (B, L, D)
        for block in self.transformer_blocks:
            x = checkpointing.run(self, block, x, timestep, class_labels, kwargs or {})
        emb = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)  # type: ignore[union-attr,operator]
        shift, scale = self.proj_out_1(nn.functional.silu(emb)).chunk(2, dim=1)
        x = self.proj_out_2(modulate(self.norm_out(x), shift, scale))
        return unpatchify(x, height, width, self.pos_embed.patch_size)


class DiTTransformer2DModel(ModelMixin, AttentionMixin, DiTNetwork):
    """The DiT denoiser.

    Args:
        sample_size: side of the latents that the network was trained on.
        num_embeds_ada_norm: number of classes; the label after the last one stands for "no class".
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # the last step uses the first block's embedding again
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    has_compatibles = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if norm_type != "ada_norm_zero":
            raise ValueError(f"norm_type {norm_type!r}: a DiT has 'ada_norm_zero'")
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.gradient_checkpointing = False
        self._build_dit()

    @classmethod
    def _get_compatibles(cls) -> list[type[ConfigMixin]]:
        from .transformer_2d import Transformer2DModel  # the name that old checkpoints have

        return [Transformer2DModel]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (and its variance, if there are twice the channels).

        Args:
            hidden_states: ``(B, C, H, W)``, latents.
            timestep, class_labels: ``(B,)``.
            cross_attention_kwargs: handed to the attention processors.
        """
        output = self._run_dit(hidden_states, timestep, class_labels, cross_attention_kwargs)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
