"""Qwen-Image (Wu et al., 2025): a two-stream rectified-flow transformer, for making images and editing them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.embeddings import TimestepEmbedding, Timesteps
from ..nn.feed_forward import FeedForward
from ..nn.joint_attention import QwenAttention
from ..nn.modulation import AdaLayerNormContinuous, add_gated, modulate
from ..nn.norms import RMSNorm
from ..nn.rotary import Memo, rotary_table
from .base import ModelMixin
from .modeling_outputs import Transformer2DModelOutput

Shape = tuple[int, int, int]  # frames, height and width of one image in tokens


class QwenTimestepProjEmbeddings(nn.Module):
    """Timestep from 0 to 1, and if wanted a flag with two states, ``(B, embedding_dim)``."""

    def __init__(self, embedding_dim: int, use_additional_t_cond: bool = False) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.timestep_embedder = TimestepEmbedding(256, embedding_dim)
        self.use_additional_t_cond = use_additional_t_cond
        if use_additional_t_cond:
            self.addition_t_embedding = nn.Embedding(2, embedding_dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype, addition_t_cond: Tensor | None = None) -> Tensor:
        time: Tensor = self.timestep_embedder(self.time_proj(timestep).to(dtype))
        if not self.use_additional_t_cond:
            return time
        if addition_t_cond is None:
            raise ValueError("this network is built with `use_additional_t_cond`: pass `additional_t_cond`, (B,)")
        return time + self.addition_t_embedding(addition_t_cond).to(dtype)  # type: ignore[no-any-return]


class QwenRotary(nn.Module):
    """Rotary tables for text tokens, then the tokens of images: frame counted from 0, row and column from the centre.

    Text goes on where the largest image ends, the same position on all axes. With ``layered``, the last
    image is the condition of the layers before it and stands at frame -1.
    """

    def __init__(self, theta: float, axes_dim: Sequence[int], layered: bool = False) -> None:
        super().__init__()
        self.theta, self.axes_dim, self.layered = theta, tuple(axes_dim), layered
        self.memo = Memo()

    def forward(self, shapes: Sequence[Shape], text_length: int, text: Tensor) -> Tensor:
        """``(text_length + tokens of all images, D / 2, 2)``, on the device of ``text``."""
        shapes = tuple((int(f), int(h), int(w)) for f, h, w in shapes)
        device = text.device
        table: Tensor = self.memo.get(
            text, (shapes, text_length, device), lambda: self._table(shapes, text_length, device)
        )
        return table

    def _table(self, shapes: Sequence[Shape], text_length: int, device: torch.device) -> Tensor:
        start = max(max(h // 2, w // 2) for _, h, w in shapes)
        if self.layered:
            start = max(start, len(shapes) - 1)
        text = torch.arange(start, start + text_length, device=device)
        ids = [text.unsqueeze(1).expand(-1, 3)]
        for i, (frames, height, width) in enumerate(shapes):
            first = -1 if self.layered and i == len(shapes) - 1 else i
            axes = [torch.arange(n, device=device) for n in (frames, height, width)]
            axes = [axes[0] + first, axes[1] - (height - height // 2), axes[2] - (width - width // 2)]
            ids.append(torch.cartesian_prod(*axes))
        return rotary_table(torch.cat(ids), self.axes_dim, self.theta)


class QwenImageTransformerBlock(nn.Module):
    """Two streams, image and text, each with modulation and feed-forward of its own, and one attention over both."""

    img_mod: nn.Sequential
    txt_mod: nn.Sequential
    img_norm1: nn.LayerNorm
    txt_norm1: nn.LayerNorm
    img_norm2: nn.LayerNorm
    txt_norm2: nn.LayerNorm
    img_mlp: FeedForward
    txt_mlp: FeedForward

    def __init__(
        self, dim: int, num_attention_heads: int, attention_head_dim: int, eps: float = 1e-6, zero_cond_t: bool = False
    ) -> None:
        super().__init__()
        self.zero_cond_t = zero_cond_t
        self.attn = QwenAttention(dim, num_attention_heads, attention_head_dim, context_dim=dim, eps=eps)
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)))
            self.add_module(f"{stream}_norm1", nn.LayerNorm(dim, elementwise_affine=False, eps=eps))
            self.add_module(f"{stream}_norm2", nn.LayerNorm(dim, elementwise_affine=False, eps=eps))
            self.add_module(f"{stream}_mlp", FeedForward(dim, activation_fn="gelu-approximate"))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, L, D), (B, L_text, D), (B, D)`` -> the text tokens and the image tokens.

        With ``zero_cond_t``, ``temb`` has the time's ``B`` rows and then those of time zero, and
        ``modulate_index`` ``(B, L)`` says which of the two a token is modulated with: 0 or 1.
        """
        img = self.img_mod(temb).chunk(6, dim=-1)
        if self.zero_cond_t and modulate_index is not None:
            temb, img = temb.chunk(2)[0], tuple(_by_token(v, modulate_index) for v in img)
        txt = self.txt_mod(temb).chunk(6, dim=-1)
        x = modulate(self.img_norm1(hidden_states), img[0], img[1])
        y = modulate(self.txt_norm1(encoder_hidden_states), txt[0], txt[1])
        x, y = self.attn(x, y, attention_mask, image_rotary_emb, **(joint_attention_kwargs or {}))

        x = add_gated(hidden_states, img[2], x)
        x = add_gated(x, img[5], self.img_mlp(modulate(self.img_norm2(x), img[3], img[4])))
        y = add_gated(encoder_hidden_states, txt[2], y)
        y = add_gated(y, txt[5], self.txt_mlp(modulate(self.txt_norm2(y), txt[3], txt[4])))
        if x.dtype == torch.float16:
            return y.clip(-65504, 65504), x.clip(-65504, 65504)
        return y, x


def _by_token(vectors: Tensor, index: Tensor) -> Tensor:
    """``(2 * B, D)`` chosen by ``(B, L)``: ``(B, L, D)``."""
    zero, one = vectors.unsqueeze(1).chunk(2)
    return torch.where(index.unsqueeze(-1) == 0, zero, one)


class QwenImageTransformer2DModel(ModelMixin, AttentionMixin):
    """The Qwen-Image denoiser.

    Args:
        in_channels: channels of a packed token.
        guidance_embeds: kept for configurations; no published network uses it.
        zero_cond_t: modulate the tokens of reference images as at time zero.
        use_additional_t_cond: take a flag beside the timestep.
        use_layer3d_rope: the images are layers of one, the last one the condition.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["QwenImageTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _repeated_blocks = ["QwenImageTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels or in_channels
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.pos_embed = QwenRotary(10000, axes_dims_rope, layered=use_layer3d_rope)
        self.time_text_embed = QwenTimestepProjEmbeddings(dim, use_additional_t_cond)
        self.txt_norm = RMSNorm(joint_attention_dim, eps=1e-6)
        self.img_in = nn.Linear(in_channels, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim, zero_cond_t=zero_cond_t)
            for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
        self.zero_cond_t = zero_cond_t
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor = None,  # type: ignore[assignment]
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor = None,  # type: ignore[assignment]
        img_shapes: Sequence[Any] | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow's velocity.

        Args:
            hidden_states: ``(B, L, in_channels)``, packed latents, those of reference images behind.
            encoder_hidden_states: ``(B, L_text, joint_attention_dim)``, Qwen2.5-VL features.
            encoder_hidden_states_mask: ``(B, L_text)``, which of them are text.
            timestep: ``(B,)`` from 0 to 1.
            img_shapes: per item the (frames, height, width) in tokens of each image; all items the same.
            guidance: refused, as no network of this kind has an input for it.
            attention_kwargs: handed to the attention processors.
            controlnet_block_samples: ``(B, L, D)`` each, added behind the blocks, each for several in a row.
        """
        if guidance is not None:
            raise ValueError("Qwen-Image has no distilled guidance: leave `guidance` out")
        if not img_shapes:
            raise ValueError("`img_shapes` is needed: per item a list of (frames, height, width) in tokens")
        x = self.img_in(hidden_states)  # (B, L, D)
        y = self.txt_in(self.txt_norm(encoder_hidden_states))  # (B, L_text, D)
        timestep, index = timestep.to(x.dtype), None
        if self.zero_cond_t:
            timestep, index = torch.cat([timestep, timestep * 0]), _is_reference(img_shapes, x.device)
        temb = self.time_text_embed(timestep, x.dtype, additional_t_cond)
        rotary = self.pos_embed(_of_first_item(img_shapes), y.shape[1], y)
        mask = None if encoder_hidden_states_mask is None else _joint_mask(encoder_hidden_states_mask, x.shape[1])

        for i, block in enumerate(self.transformer_blocks):
            y, x = checkpointing.run(self, block, x, y, temb, rotary, mask, attention_kwargs, index)
            if controlnet_block_samples is not None:
                interval = ceil(len(self.transformer_blocks) / len(controlnet_block_samples))
                x = x + controlnet_block_samples[i // interval]

        temb = temb.chunk(2)[0] if self.zero_cond_t else temb
        output = self.proj_out(self.norm_out(x, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _of_first_item(shapes: Sequence[Any]) -> Sequence[Shape]:
    first = shapes[0]
    return first if isinstance(first[0], (tuple, list)) else [first]


def _is_reference(shapes: Sequence[Any], device: torch.device) -> Tensor:
    """``(B, L)``: 0 for the tokens of an item's first image, 1 for those of the others."""
    sizes = [[prod(image) for image in item] for item in shapes]
    return torch.tensor([[0] * item[0] + [1] * sum(item[1:]) for item in sizes], device=device)


def _joint_mask(text: Tensor, length: int) -> Tensor:
    """The mask over text tokens and then ``length`` image tokens, all of them seen: ``(B, 1, 1, L_text + L)``."""
    image = torch.ones((text.shape[0], length), dtype=torch.bool, device=text.device)
    return torch.cat((text.bool(), image), dim=1)[:, None, None]
