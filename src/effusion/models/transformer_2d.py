"""Transformer2DModel: one name for four kinds of transformers over images, chosen by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.masks import additive
from ..nn.transformer_2d import BasicTransformerBlock
from .base import ModelMixin
from .modeling_outputs import Transformer2DModelOutput
from .transformer_dit import DiTNetwork, DiTTransformer2DModel
from .transformer_pixart import PixArtNetwork, PixArtTransformer2DModel


class AdaLayerNorm(nn.Module):
    """Layer norm with scale and shift for each timestep of a table."""

    def __init__(self, dim: int, num_embeddings: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_embeddings, dim)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, dim * 2)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """``(B, L, D)``, and one timestep for all: ``()`` or ``(1,)``."""
        scale, shift = self.linear(self.silu(self.emb(timestep))).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift  # type: ignore[no-any-return]


class AdaNormBlock(BasicTransformerBlock):
    """A transformer block whose attention comes after norms that know the time (Gu et al., 2021)."""

    def __init__(self, dim: int, heads: int, dim_head: int, num_embeddings: int, **kwargs: Any) -> None:
        super().__init__(dim, heads, dim_head, **kwargs)
        self.norm1 = AdaLayerNorm(dim, num_embeddings)  # type: ignore[assignment]
        if self.attn2 is not None:
            self.norm2 = AdaLayerNorm(dim, num_embeddings)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, *context: Any, timestep: Tensor | None = None) -> Tensor:
        """As the block without time, and one ``timestep`` for all."""
        if timestep is None:
            raise ValueError("a transformer with num_embeds_ada_norm needs `timestep`")
        mask, tokens, tokens_mask, kwargs = context
        x, more = hidden_states, kwargs or {}
        first = tokens if self.only_cross_attention else None
        x = x + self.attn1(self.norm1(x, timestep), first, mask, **more)
        if self.attn2 is not None:
            second = None if self.double_self_attention else tokens
            x = x + self.attn2(self.norm2(x, timestep), second, tokens_mask, **more)
        return x + self.ff(self.norm3(x))  # type: ignore[no-any-return]


class ImagePositionalEmbeddings(nn.Module):
    """Discrete latents with learnt rows and columns: indices ``(B, L) -> (B, L, D)`` (VQ-Diffusion)."""

    def __init__(self, num_embed: int, height: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(num_embed, embed_dim)
        self.height_emb = nn.Embedding(height, embed_dim)
        self.width_emb = nn.Embedding(width, embed_dim)

    def forward(self, index: Tensor) -> Tensor:
        places = (self.height_emb.weight.unsqueeze(1) + self.width_emb.weight).flatten(0, 1)  # (H * W, D)
        return self.emb(index) + places[: index.shape[1]]  # type: ignore[no-any-return]


class Transformer2DModel(ModelMixin, AttentionMixin, DiTNetwork, PixArtNetwork):
    """A transformer over one of these, by which arguments are given:

    - ``patch_size`` and ``norm_type="ada_norm_zero"``: latents in patches, conditioned on a class (DiT);
    - ``patch_size`` and ``norm_type="ada_norm_single"``: latents in patches, conditioned on text (PixArt);
    - ``num_vector_embeds``: discrete latents; gives log-probabilities (VQ-Diffusion);
    - ``in_channels`` alone: the pixels of a feature map, to whose values the result is added.

    A checkpoint of the first two kinds is loaded as the class that has their name now.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "AdaNormBlock", "DiTBlock", "PixArtBlock"]
    _repeated_blocks = ["BasicTransformerBlock", "AdaNormBlock", "DiTBlock", "PixArtBlock"]
    _skip_layerwise_casting_patterns = ["latent_image_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = None,
        attention_bias: bool = False,
        sample_size: int | None = None,
        num_vector_embeds: int | None = None,
        patch_size: int | None = None,
        activation_fn: str = "geglu",
        num_embeds_ada_norm: int | None = None,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_type: str = "layer_norm",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        attention_type: str = "default",
        caption_channels: int | None = None,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
    ) -> None:
        super().__init__()
        self.kind = self._kind()
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.use_linear_projection = use_linear_projection
        self.gradient_checkpointing = False
        if self.kind == "dit":
            self._build_dit(
                interpolation_scale if interpolation_scale is not None else max((sample_size or 0) // 64, 1)
            )
        elif self.kind == "pixart":
            if use_additional_conditions is None:
                use_additional_conditions = sample_size == 128
            self.use_additional_conditions = use_additional_conditions
            self._build_pixart(only_cross_attention, double_self_attention)
        elif self.kind == "vectors":
            self.latent_image_embedding = ImagePositionalEmbeddings(num_vector_embeds, sample_size, sample_size, dim)  # type: ignore[arg-type]
            self.transformer_blocks = self._plain_blocks()
            self.norm_out = nn.LayerNorm(dim)
            self.out = nn.Linear(dim, num_vector_embeds - 1)  # type: ignore[operator]
        else:
            self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)  # type: ignore[arg-type]
            ends: list[nn.Module] = [
                nn.Linear(a, b) if use_linear_projection else nn.Conv2d(a, b, 1)  # type: ignore[arg-type]
                for a, b in ((in_channels, dim), (dim, out_channels or in_channels))
            ]
            self.proj_in, self.proj_out = ends  # type: ignore[assignment]
            self.transformer_blocks = self._plain_blocks()

    def _kind(self) -> str:
        """Which of the four, after checking that the rest of the configuration fits.

        Raises:
            ValueError: it does not.
        """
        c = self.config
        given = {n: c[n] for n in ("patch_size", "num_vector_embeds") if c[n] is not None}
        if len(given) > 1 or (c.in_channels is None and c.num_vector_embeds is None):
            raise ValueError(
                "give either in_channels (with patch_size for patches) or num_vector_embeds; "
                f"got in_channels={c.in_channels}, {given}"
            )
        if c.attention_type != "default":
            raise ValueError(f"attention_type {c.attention_type!r} is not supported; there is 'default'")
        if given and c.sample_size is None:
            raise ValueError(f"{next(iter(given))} needs sample_size, the side of the latents")
        kinds = {"ada_norm_zero": "dit", "ada_norm_single": "pixart"}
        if c.patch_size is not None:
            if c.norm_type not in kinds:
                raise ValueError(f"norm_type {c.norm_type!r} with patch_size: allowed are {', '.join(kinds)}")
            return kinds[c.norm_type]
        if c.norm_type not in ("layer_norm", "ada_norm") or not c.norm_elementwise_affine:
            raise ValueError(
                f"norm_type {c.norm_type!r} with norm_elementwise_affine={c.norm_elementwise_affine}: "
                "without patch_size, allowed are 'layer_norm' and 'ada_norm' with True"
            )
        return "pixels" if c.num_vector_embeds is None else "vectors"

    def _plain_blocks(self) -> nn.ModuleList:
        c = self.config
        options = {n: c[n] for n in ("dropout", "cross_attention_dim", "activation_fn", "attention_bias", "norm_eps")}
        options.update({n: c[n] for n in ("only_cross_attention", "double_self_attention", "upcast_attention")})
        heads = (self.inner_dim, c.num_attention_heads, c.attention_head_dim)
        if c.num_embeds_ada_norm is not None:
            return nn.ModuleList(AdaNormBlock(*heads, c.num_embeds_ada_norm, **options) for _ in range(c.num_layers))
        return nn.ModuleList(BasicTransformerBlock(*heads, **options) for _ in range(c.num_layers))

    # -- the names of today --------------------------------------------------------------------------

    @classmethod
    def _prepare(cls, path: Any, options: Any, **config_changes: Any) -> Any:
        named = None if path is None else _named_class(cls.load_config(path, **options.where))
        if named is not None and cls is Transformer2DModel:
            return named._prepare(path, options, **config_changes)
        return super()._prepare(path, options, **config_changes)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Build a network; one of DiT's or PixArt's kind as the class that has its name."""
        named = _named_class({**(config or {}), **kwargs})
        if named is not None and cls is Transformer2DModel:
            return named.from_config(config, **kwargs)
        return super().from_config(config, **kwargs)

    # -- computing -----------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """What the network predicts.

        Args:
            hidden_states: latents or features ``(B, C, H, W)``; indices ``(B, L)`` of discrete latents.
            encoder_hidden_states: ``(B, S, D)``, the text.
            timestep, class_labels: ``(B,)``; one timestep for all where it chooses from a table.
            added_cond_kwargs: as in :class:`PixArtTransformer2DModel`.
            attention_mask, encoder_attention_mask: ``(B, L)`` and ``(B, S)`` of 1 (seen) and 0, or added to scores.

        Returns:
            ``sample``: ``(B, C, H, W)``, or log-probabilities ``(B, classes - 1, L)`` of discrete latents.
        """
        x, text, kwargs = hidden_states, encoder_hidden_states, cross_attention_kwargs
        if self.kind == "dit":
            x = self._run_dit(x, timestep, class_labels, kwargs)
        elif self.kind == "pixart":
            x = self._run_pixart(x, text, timestep, added_cond_kwargs, attention_mask, encoder_attention_mask, kwargs)
        else:
            dtype = self.dtype
            context = (additive(attention_mask, dtype), text, additive(encoder_attention_mask, dtype), kwargs)
            x = self._run_vectors(x, timestep, context) if self.kind == "vectors" else self._run(x, timestep, context)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def _blocks(self, x: Tensor, timestep: Tensor | None, context: tuple[Any, ...]) -> Tensor:
        for block in self.transformer_blocks:
            if isinstance(block, AdaNormBlock):
                x = checkpointing.run(self, lambda *a, b=block: b(*a, timestep=timestep), x, *context)
            else:
                x = checkpointing.run(self, block, x, *context)
        return x

    def _run_vectors(self, index: Tensor, timestep: Tensor | None, context: tuple[Any, ...]) -> Tensor:
        x = self._blocks(self.latent_image_embedding(index), timestep, context)
        logits = self.out(self.norm_out(x)).transpose(1, 2)  # (B, classes - 1, L)
        return torch.log_softmax(logits.double(), dim=1).float()

    def _run(self, image: Tensor, timestep: Tensor | None, context: tuple[Any, ...]) -> Tensor:
        size, x = image.shape[2:], self.norm(image)
        linear = self.use_linear_projection
        x = self.proj_in(x.flatten(2).transpose(1, 2)) if linear else self.proj_in(x).flatten(2).transpose(1, 2)
        x = self._blocks(x, timestep, context)
        x = self.proj_out(x) if linear else x
        x = x.transpose(1, 2).unflatten(2, size)
        x = x if linear else self.proj_out(x)
        return x + image  # type: ignore[no-any-return]


def _named_class(config: Mapping[str, Any]) -> type[ModelMixin] | None:
    kinds: dict[Any, type[ModelMixin]] = {
        "ada_norm_zero": DiTTransformer2DModel,
        "ada_norm_single": PixArtTransformer2DModel,
    }
    return kinds.get(config.get("norm_type")) if config.get("patch_size") is not None else None
